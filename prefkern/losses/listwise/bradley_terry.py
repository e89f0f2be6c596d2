"""Bradley-Terry loss of a reward model's own scores."""

from __future__ import annotations

from torch import Tensor

from ...ops.list_rank import list_rank
from ...ops.segment_sum import segment_sum
from .. import core
from ..declare import listwise


@listwise(
    source="arXiv 2203.02155 eq. 1", status="pair core checked against rax", score="mean_logp"
)
def bradley_terry(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    pair_reduction: str = "mean",
    center: float = 0.0,
    backend: str = "auto",
) -> Tensor:  # [G]
    """Reward-model loss: the likelihood of every comparison under differences of plain scores.

    l = 1 / |pairs| sum_{y_i > y_j} softplus(-(r_i - r_j)) + center mean_i r_i^2

    For two answers it is the usual softplus(-(r_chosen - r_rejected)); for K ranked answers all
    K (K - 1) / 2 comparisons of a prompt count as one sample, which keeps them from being learnt
    by heart.

    Ouyang et al. 2022 (arXiv 2203.02155), eq. 1. Scores come from any reward head; nothing here is
    a log-probability. Through preference_loss the score is the mean log-probability per token.

    Args:
        scores: `[S]` reward r of each answer.
        relevance: `[S]` rank or rating, higher is better, ties form no pair; NaN leaves an answer
            out.
        pair_reduction: "mean" (paper) or "sum" over the comparisons of a prompt.
        center: Weight of the pull of rewards to 0, which fixes their free constant, >= 0. Groups
            without a comparison are pulled too.

    Returns:
        Unreduced loss `[G]`; a group without a strict pair has only its centering term.
    """
    core.not_negative("center", center)
    loss = list_rank(
        scores, relevance, cu_groups, family="pair", pair_reduction=pair_reduction, backend=backend
    )
    if center == 0.0:
        return loss
    squares = core.group_sum(scores * scores, relevance, cu_groups)
    size = segment_sum((~relevance.isnan()).to(scores.dtype), cu_groups).clamp(min=1.0)
    return loss + center * squares / size.to(loss.dtype)
