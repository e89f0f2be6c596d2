"""Preference ranking optimization: each rank against all lower ones, at reward-gap temperatures."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...ops.segment_sum import segment_sum
from .. import core
from ..declare import listwise
from ..lists import Lists


@listwise(
    source="arXiv 2306.17492",
    status="checked against the authors' objective retyped; weight from their training scripts",
    score="mean_logp",
)
def pro(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    logp: Tensor | None = None,  # [S]
    length: Tensor | None = None,  # [S]
    sft_weight: float = 0.05,
    backend: str = "auto",
) -> Tensor:  # [G]
    """PRO: log-likelihood of each rank winning against the lower ones, plus the best one's NLL.

    l = sum_{k < K} [LSE(M_k a_k, {m_ki a_i}_{i > k}) - M_k a_k] - sft_weight (K - 1)^2 logp_best,
    a = mean_logp,  m_ki = y_k - y_i,  M_k = max_{i > k} m_ki,  k and i in order of relevance

    Song et al. 2023 (arXiv 2306.17492), as in the authors' code without its 1e-10 inside the log.

    Args:
        relevance: `[S]` reward, higher is better; NaN leaves an answer out. The scale matters: gaps
            act as inverse temperatures.
        sft_weight: Weight of the likelihood term, >= 0.

    Returns:
        Unreduced loss `[G]`; 0 for a list of one and where all rewards are equal (then no
        answer is the best).
    """
    core.not_negative("sft_weight", sft_weight)
    relevance = core.drop_empty(relevance, length)
    ranking = _ranks(Lists(scores, relevance, cu_groups, backend))
    if sft_weight == 0:
        return ranking
    nll = core.best_nll(logp, relevance, cu_groups, strict=True)
    size = segment_sum((~relevance.isnan()).double(), cu_groups)
    nll = nll * (size - 1.0).clamp(min=0.0) ** 2
    return ranking + sft_weight * nll.to(ranking.dtype)


def _ranks(lists: Lists) -> Tensor:  # [G]
    """sum over ranks k < K of LSE(M_k a_k, {m_ki a_i : i after k}) - M_k a_k."""
    label, rank = lists.relevance, lists.rank()

    def below(y: Tensor, a: Tensor, r: Tensor, y_i: Tensor, a_i: Tensor, r_i: Tensor) -> Tensor:
        return torch.where(r_i > r, (y - y_i) * a_i, -torch.inf)

    others = lists.over_mates(below, label, lists.score, rank, reduce="logsumexp")
    widest = label + lists.spread(lists.most(-label))
    stage = lists.differ() & (rank < lists.spread(lists.size()))
    value = -logsigmoid(widest * lists.score - others)
    return lists.loss(lists.sum(torch.where(stage, value, 0.0)))
