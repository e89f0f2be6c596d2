"""BiAlign: a student ranks subsets of demonstrations as its teacher does, beside distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.ragged import first_best
from .. import core
from ..declare import listwise
from ..lists import Lists


@listwise(
    source="arXiv 2312.17055",
    status="ranking term after two notes on the ACL 2025 version, which agree; direction of the KL "
    "as notes give it; no official code found",
    reads=("logp", "fkl"),
    score="logp",
    read_as={"fkl": "whole", "length": "whole"},
)
def bialign(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    fkl: Tensor,  # [S]
    length: Tensor,  # [S]
    lam: float = 1.0,
    constant_range: bool = False,
    tokens_per_group: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [G]
    """BiAlign: KL on the first sequence of each list, ranking of the same answer under N prompts.

    l = KL(teacher || policy) per token of the first sequence + lam sum_{y_i > y_j} max(0,
        (q_j - q_i) / (max q - min q) + (rank_j - rank_i) / (N - 1)),  q = log-probability of the
        answer (scores), rank 1 = the teacher's favourite

    Qin et al. 2025 (arXiv 2312.17055): each list is one answer after all demonstrations (the KL)
    and after N = 4 random subsets of them (the ranking). The teacher is given as the reference
    model; with likelihood_targets the KL is over the demonstrations too, as published.

    Args:
        scores: `[S]` log-probability of the answer given each subset of demonstrations.
        relevance: `[S]` the teacher's score of the same, higher is better; NaN leaves a sequence
            out of the ranking (a first sequence that is there for the KL alone).
        cu_groups: `[G+1]` boundaries of the lists; the first sequence of each holds the full
            context.
        fkl: `[S]` KL(teacher || policy) summed over the tokens of each sequence.
        length: `[S]` scored tokens of each sequence.
        lam: Weight of the ranking term, >= 0.
        constant_range: Takes max q - min q without gradient. With it the published form has no
            gradient for N = 2, where the ratio is always 1.
        tokens_per_group: Mean length of the first sequences over a whole step of several
            micro-batches; None: the batch's own.

    Returns:
        Unreduced loss `[G]`, whose mean holds the KL per token of all first sequences. Where all q
        are equal their differences count 0, without gradient.
    """
    core.not_negative("lam", lam)
    core.real("fkl", fkl)
    core.difference(fkl, scores)
    lists = Lists(scores, core.drop_empty(relevance, length), cu_groups, backend)
    q, place = lists.score, lists.rank()
    width = _range(lists, q)
    if constant_range:
        width = width.detach()
    flat = width <= 0
    share = torch.where(flat, 0.0, q / torch.where(flat, 1.0, width))
    gap = place / (lists.spread(lists.size()) - 1.0).clamp(min=1.0)

    def hinge(s: Tensor, y: Tensor, r: Tensor, s_j: Tensor, y_j: Tensor, r_j: Tensor) -> Tensor:
        return torch.where(y > y_j, torch.relu(s_j - s + r_j - r), 0.0)

    ranking = lists.loss(lists.sum(lists.over_mates(hinge, share, lists.relevance, gap)))
    # An empty list has no first sequence: the index is that of another, and its value becomes 0.
    filled = cu_groups[1:] > cu_groups[:-1]
    first = cu_groups[:-1].long().clamp(max=max(scores.numel() - 1, 0))
    if scores.numel() == 0:
        return lam * ranking
    kl = torch.where(filled, fkl[first], 0.0)
    tokens = torch.where(filled, length[first], 0.0)
    return core.per_token(kl, tokens, tokens_per_group).to(ranking.dtype) + lam * ranking


def _range(lists: Lists, q: Tensor) -> Tensor:  # [S]
    """Largest less smallest valid q of each item's list, with gradient to the first of each."""
    held = torch.where(lists.valid, q.detach(), torch.nan)
    ends = []
    for sign in (1.0, -1.0):
        at = first_best(sign * held, lists.cu_groups)
        ends.append(lists.spread(lists.sum(torch.where(at, q, 0.0))))
    return ends[0] - ends[1]
