"""Preference ranking optimization: each rank against all lower ones, at reward-gap temperatures."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.list_rank import list_rank
from ...ops.segment_sum import segment_sum
from .. import core
from ..record import Loss
from ..weights.token_weights import sequence_of


def pro(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    logp: Tensor | None = None,  # [S]
    length: Tensor | None = None,  # [S]
    sft_weight: float = 0.05,
    backend: str = "auto",
) -> Tensor:  # [G]
    """PRO: log-likelihood of each rank winning against the lower ones, plus the best one's NLL.

    l = sum_{k < K} [LSE(M_k a_k, {m_ki a_i}_{i > k}) - M_k a_k] - sft_weight (K - 1)^2 logp_best,
    a = mean_logp,  m_ki = y_k - y_i,  M_k = max_{i > k} m_ki,  k and i in label order

    Song et al. 2023 (arXiv 2306.17492), as in the authors' code without its 1e-10 inside the log.

    Args:
        scores: `[S]` mean log-probability per token of each response.
        labels: `[S]` reward, higher is better, NaN removes a response. The scale matters: gaps act
            as inverse temperatures.
        cu_groups: `[G+1]` boundaries of the lists.
        logp: `[S]` summed log-probability of each response, for the supervised term; not needed
            with sft_weight=0.
        length: `[S]` scored tokens of each response; empty responses are removed. Default None,
            no response is empty.
        sft_weight: Weight of the supervised term, >= 0, default 0.05.
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; 0 for a list of one and where all rewards are equal (then there is no
        best response either).

    Raises:
        ValueError: sft_weight < 0, or > 0 without logp; shapes that do not fit.
    """
    if sft_weight < 0:
        raise ValueError(f"sft_weight must be >= 0, got {sft_weight}.")
    labels = core.drop_empty(labels, length)
    ranking = list_rank(scores, labels, cu_groups, family="pro", backend=backend)
    if sft_weight == 0:
        return ranking
    if logp is None:
        raise ValueError(
            "pro's supervised term needs logp [S], the summed log-probability of each response; "
            "pass "
            "it, or sft_weight=0."
        )
    return ranking + sft_weight * _best_nll(logp, labels, cu_groups).to(ranking.dtype)


def _best_nll(logp: Tensor, labels: Tensor, cu_groups: Tensor) -> Tensor:  # [G]
    """(K - 1)^2 times the NLL of the first response of highest label; 0 where no label differs."""
    best = best_of_group(labels, cu_groups, strict=True)
    size = segment_sum((~labels.isnan()).double(), cu_groups)
    nll = segment_sum(torch.where(best, -logp, 0.0), cu_groups)
    return nll * (size - 1.0).clamp(min=0.0) ** 2


def best_of_group(labels: Tensor, cu_groups: Tensor, *, strict: bool = False) -> Tensor:  # [S]
    """True at the first response of highest label of each group; nowhere in a group whose labels
    are all equal if `strict`."""
    group = sequence_of(cu_groups, labels)
    valid = ~labels.isnan()
    groups = cu_groups.numel() - 1
    low = labels.new_full((groups,), torch.inf).scatter_reduce(
        0, group, torch.where(valid, labels, torch.inf), "amin"
    )
    high = labels.new_full((groups,), -torch.inf).scatter_reduce(
        0, group, torch.where(valid, labels, -torch.inf), "amax"
    )
    item = torch.arange(labels.numel(), device=labels.device)
    top = valid & (labels == high[group])
    first = item.new_full((groups,), labels.numel()).scatter_reduce(
        0, group, torch.where(top, item, labels.numel()), "amin"
    )
    best = top & (item == first[group])
    return best & (high > low)[group] if strict else best


PRO = Loss(
    pro,
    "pro",
    "listwise",
    extra=("logp", "length"),
    status="checked against the authors' objective retyped; weight from their training scripts",
    source="arXiv 2306.17492",
    score="mean_logp",
    rewards=core.mean_logp_rewards,
)
