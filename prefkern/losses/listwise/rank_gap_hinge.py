"""Hinges that grow with the rank gap, alone and beside a distillation KL (after BiAlign)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import core
from ..declare import formula, listwise
from ..lists import Lists


@listwise(
    source="arXiv 2312.17055",
    status="provisional: two readings of an equation that was not legible",
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

    Two readings of an equation of BiAlign (arXiv 2312.17055) that was not legible.

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


@listwise(
    source="arXiv 2312.17055",
    status="provisional: ranking term guessed, direction of the KL assumed",
    reads=("logp", "fkl"),
    score="mean_logp",
)
def bialign(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    fkl: Tensor,  # [S]
    length: Tensor,  # [S]
    lam: float = 1.0,
    mode: str = "margin",
    tokens_per_group: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [G]
    """Distillation KL on the first sequence of each list plus a rank-gap hinge over the list.

    l = KL(teacher || policy) per token of the first sequence
        + lam sum_{y_i > y_j} max(0, (rank_j - rank_i) / K - (a_i - a_j)),  a = mean_logp

    After BiAlign (arXiv 2312.17055), whose ranking equation was not legible and whose KL direction
    is assumed. The teacher is given as the reference model.

    Args:
        scores: `[S]` mean log-probability per token of the answer given each subset of examples.
        relevance: `[S]` the teacher's score of the same, higher is better; NaN leaves a sequence
            out of the ranking (a first sequence that is there for the KL alone).
        cu_groups: `[G+1]` boundaries of the lists; the first sequence of each holds the full
            context.
        fkl: `[S]` KL(teacher || policy) summed over the tokens of each sequence.
        length: `[S]` scored tokens of each sequence.
        lam: Weight of the ranking term, >= 0.
        mode: As in `rank_gap_hinge`.
        tokens_per_group: Mean length of the first sequences over a whole step of several
            micro-batches; None: the batch's own.

    Returns:
        Unreduced loss `[G]`, whose mean holds the KL per token of all first sequences.
    """
    core.not_negative("lam", lam)
    core.difference(fkl, scores)
    ranking = formula(rank_gap_hinge)(
        scores, core.drop_empty(relevance, length), cu_groups, mode=mode, per_item=True,
        backend=backend,
    )  # fmt: skip
    # An empty list has no first sequence: it borrows one and is weighed 0.
    filled = cu_groups[1:] > cu_groups[:-1]
    first = cu_groups[:-1].long().clamp(max=max(scores.numel() - 1, 0))
    if scores.numel() == 0:
        return lam * ranking
    kl = torch.where(filled, fkl[first], 0.0)
    tokens = torch.where(filled, length[first], 0.0)
    return core.per_token(kl, tokens, tokens_per_group).to(ranking.dtype) + lam * ranking
