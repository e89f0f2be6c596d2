"""Hinges that grow with the rank gap, on mean log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import core
from ..declare import listwise
from ..lists import Lists


@listwise(
    source="arXiv 2312.17055",
    status="provisional: two readings of an equation that is another",
    score="mean_logp",
)
def rank_gap_hinge(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    mode: str = "margin",
    scale: float = 1.0,
    per_item: bool = False,
    backend: str = "auto",
) -> Tensor:  # [G]
    """Pairwise hinge on scores whose margin, or whose weight, is the gap between the ranks.

    l = sum_{y_i > y_j} max(0, c_ij - (a_i - a_j))        mode "margin"
    l = sum_{y_i > y_j} c_ij max(0, -(a_i - a_j))         mode "product"
    with c_ij = scale (rank_j - rank_i),  a = mean_logp

    Two early readings of the ranking term of BiAlign (arXiv 2312.17055), which `bialign` has.

    Args:
        relevance: `[S]` the teacher's score, higher is better; NaN leaves an answer out.
        mode: "margin" or "product".
        scale: Factor of the rank gap.
        per_item: Divides the rank gap by the number of answers.

    Returns:
        Unreduced loss `[G]`; the derivative is 0 at the kink.
    """
    core.choice("mode", mode, ("margin", "product"))
    core.finite("scale", scale)
    lists = Lists(scores, relevance, cu_groups, backend)
    place = scale * lists.rank()
    if per_item:
        place = place / lists.spread(lists.size()).clamp(min=1.0)

    def hinge(s: Tensor, y: Tensor, r: Tensor, s_j: Tensor, y_j: Tensor, r_j: Tensor) -> Tensor:
        apart, gap = r_j - r, s - s_j
        value = torch.relu(apart - gap) if mode == "margin" else apart * torch.relu(-gap)
        return torch.where(y > y_j, value, 0.0)

    return lists.loss(lists.sum(lists.over_mates(hinge, lists.score, lists.relevance, place)))
