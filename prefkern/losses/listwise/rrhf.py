"""RRHF and KnowPAT: rankings of mean log-probabilities beside the likelihood of the best answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.list_rank import list_rank
from ...ops.segment_sum import segment_sum
from .. import core
from ..record import Loss
from .pro import best_of_group


def rrhf(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    logp: Tensor | None = None,  # [S]
    length: Tensor | None = None,  # [S]
    rrhf_weight: float = 1.0,
    sft_weight: float = 1.0,
    length_penalty: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # [G]
    """RRHF: a response must not be likelier per token than a better one; the best is imitated.

    l = rrhf_weight sum_{y_i > y_j} max(0, a_j - a_i) - sft_weight logp_best,
    a = logp / length^length_penalty

    Yuan et al. 2023 (arXiv 2304.05302). The authors' code divides by the padded length; here a
    response is divided by its own.

    Args:
        scores: `[S]` mean log-probability per token of each response.
        labels: `[S]` reward, higher is better; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        logp: `[S]` summed log-probability of each response, for the likelihood term; not needed
            with sft_weight=0.
        length: `[S]` scored tokens of each response; empty responses are removed. Default None,
            no response is empty.
        rrhf_weight: Factor of the ranking term, >= 0, default 1 (the script; 100 in the arguments).
        sft_weight: Factor of the likelihood term, >= 0, default 1.
        length_penalty: Exponent of the length that divides a response's log-probability, >= 0,
            default 1 (the mean per token, which `scores` are).
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; the derivative of the ranking term is 0 at its kink.

    Raises:
        ValueError: a negative weight, sft_weight > 0 without logp, length_penalty < 0 or not 1
            without length, shapes that do not fit.
    """
    core.not_negative("rrhf_weight", rrhf_weight)
    core.not_negative("length_penalty", length_penalty)
    if length_penalty != 1.0:
        if length is None:
            raise ValueError("length_penalty other than 1 needs length [S], got none; pass it.")
        # the scores are per token: length^(1 - p) makes them logp / length^p
        size = core.data("length", length, scores).clamp(min=1.0)
        scores = scores * size ** (1.0 - length_penalty)
    labels = core.drop_empty(labels, length)
    ranking = list_rank(scores, labels, cu_groups, family="hinge", margin=0.0, backend=backend)
    return rrhf_weight * ranking + _imitation("rrhf", logp, labels, cu_groups, sft_weight, ranking)


def knowpat(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    length: Tensor | None = None,  # [S]
    inner: str = "sum",
    knowpat_weight: float = 0.1,
    sft_weight: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # [G]
    """KnowPAT: every answer but the last is raised against all lower ones, the likelier the more.

    l = knowpat_weight / (K-1) sum_i mu_i [softplus(-a_i) + c_i sum_{y_j < y_i} softplus(a_j)]
        - sft_weight a_best,  a = mean_logp

    with mu_i = (a_i - min a) / (max a - min a) constant (1 where all are equal), c_i = 1 for
    inner="sum" (paper) and 1 / (number of lower answers) for "mean" (code).

    Zhang et al. 2023 (arXiv 2311.06503). The scale of the likelihood term, per token here, is not
    stated where the equation was read.

    Args:
        scores: `[S]` mean log-probability per token of each response.
        labels: `[S]` preference, higher is better; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        length: `[S]` scored tokens of each response; empty responses are removed. Default None,
            no response is empty.
        inner: "sum" (paper) or "mean" (code), default "sum".
        knowpat_weight: Factor of the alignment term, >= 0, default 0.1 (the authors' script).
        sft_weight: Factor of the likelihood of the best answer, >= 0, default 1.
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; the alignment term is 0 where no label differs.

    Raises:
        ValueError: a negative weight, an unknown inner, shapes that do not fit.
    """
    core.not_negative("knowpat_weight", knowpat_weight)
    labels = core.drop_empty(labels, length)
    aligned = list_rank(scores, labels, cu_groups, family="anchor", inner=inner, backend=backend)
    return knowpat_weight * aligned + _imitation(
        "knowpat", scores, labels, cu_groups, sft_weight, aligned
    )


def _imitation(
    name: str, logp: Tensor | None, labels: Tensor, cu_groups: Tensor, weight: float, like: Tensor
) -> Tensor | float:  # [G]
    """Weighted negative log-likelihood of the first response of highest label."""
    core.not_negative("sft_weight", weight)
    if weight == 0:
        return 0.0
    if logp is None:
        raise ValueError(
            f"{name}'s likelihood term needs logp [S], the summed log-probability of each "
            "response; pass it, or sft_weight=0."
        )
    best = best_of_group(labels, cu_groups)
    return weight * segment_sum(torch.where(best, -logp, 0.0), cu_groups).to(like.dtype)


RRHF = Loss(
    rrhf,
    "rrhf",
    "listwise",
    extra=("logp", "length"),
    status="ranking term checked against the authors' code, with true lengths",
    source="arXiv 2304.05302",
    score="mean_logp",
    rewards=core.mean_logp_rewards,
)


def _rewards(seq: Any, **_: Any) -> Tensor:
    return seq.mean_logp


KNOWPAT = Loss(
    knowpat,
    "knowpat",
    "listwise",
    extra=("length",),
    status="equation second-hand; inner='mean' checked against the authors' code",
    source="arXiv 2311.06503",
    score="mean_logp",
    rewards=_rewards,
)
