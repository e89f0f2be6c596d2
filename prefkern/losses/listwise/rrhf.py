"""RRHF and KnowPAT: rankings of mean log-probabilities beside the likelihood of the best answer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import core
from ..declare import listwise
from ..lists import Lists
from .lipo import pair_hinges


@listwise(
    source="arXiv 2304.05302",
    status="ranking term checked against the authors' code, with true lengths",
    score="mean_logp",
)
def rrhf(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    logp: Tensor | None = None,  # [S]
    length: Tensor | None = None,  # [S]
    rrhf_weight: float = 1.0,
    sft_weight: float = 1.0,
    length_penalty: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # [G]
    """RRHF: an answer must not be likelier per token than a better one; the best is imitated.

    l = rrhf_weight sum_{y_i > y_j} max(0, a_j - a_i) - sft_weight logp_best,
    a = logp / length^length_penalty

    Yuan et al. 2023 (arXiv 2304.05302). The authors' code divides by the padded length; here an
    answer is divided by its own.

    Args:
        rrhf_weight: Factor of the ranking term, >= 0; 1 in the authors' script, 100 in its
            arguments.
        sft_weight: Factor of the likelihood term, >= 0.
        length_penalty: Exponent of the length that divides an answer's log-probability, >= 0; 1 is
            the mean per token, which `scores` are.

    Returns:
        Unreduced loss `[G]`; the derivative of the ranking term is 0 at its kink.
    """
    core.not_negative("rrhf_weight", rrhf_weight)
    core.not_negative("sft_weight", sft_weight)
    core.not_negative("length_penalty", length_penalty)
    if length_penalty != 1.0:
        if length is None:
            raise ValueError("length_penalty other than 1 needs length [S], got none; pass it.")
        # the scores are per token: length^(1 - p) makes them logp / length^p
        size = core.data("length", length, scores).clamp(min=1.0)
        scores = scores * size ** (1.0 - length_penalty)
    relevance = core.drop_empty(relevance, length)
    ranking = pair_hinges(Lists(scores, relevance, cu_groups, backend), 0.0)
    if sft_weight == 0:
        return rrhf_weight * ranking
    nll = core.best_nll(logp, relevance, cu_groups).to(ranking.dtype)
    return rrhf_weight * ranking + sft_weight * nll


@listwise(
    source="arXiv 2311.06503",
    status="equation second-hand; inner='mean' checked against the authors' code",
    score="mean_logp",
)
def knowpat(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
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
        inner: "sum" (paper) or "mean" (code).
        knowpat_weight: Factor of the alignment term, >= 0; the default is the authors' script's.
        sft_weight: Factor of the likelihood of the best answer, >= 0.

    Returns:
        Unreduced loss `[G]`; the alignment term is 0 where all are equally relevant.
    """
    core.not_negative("knowpat_weight", knowpat_weight)
    core.not_negative("sft_weight", sft_weight)
    relevance = core.drop_empty(relevance, length)
    aligned = _anchors(Lists(scores, relevance, cu_groups, backend), inner)
    if sft_weight == 0:
        return knowpat_weight * aligned
    nll = core.best_nll(scores, relevance, cu_groups).to(aligned.dtype)
    return knowpat_weight * aligned + sft_weight * nll


def _anchors(lists: Lists, inner: str) -> Tensor:  # [G]
    """1/(K-1) sum_i mu_i [softplus(-s_i) + c_i sum_{y_j < y_i} softplus(s_j)], mu constant."""
    core.choice("inner", inner, ("sum", "mean"))
    s, size = lists.score, lists.spread(lists.size())
    low, high = lists.spread(-lists.most(-s)), lists.spread(lists.most(s))
    apart = high > low
    mu = torch.where(apart, (s.detach() - low) / torch.where(apart, high - low, 1.0), 1.0)
    anchor = lists.differ() & (lists.rank() < size)
    mu = torch.where(anchor, mu, 0.0) / (size - 1.0).clamp(min=1.0)
    each = mu / lists.lower().clamp(min=1.0) if inner == "mean" else mu  # on every lower item
    push = lists.over_mates(
        lambda y, w, y_i, w_i: torch.where(y_i > y, w_i, 0.0), lists.relevance, each
    )
    return lists.loss(lists.sum(-mu * logsigmoid(s) - push * logsigmoid(-s)))
