"""An explicit list of pairs, each with the probability that its first answer is better."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...ops import ragged
from ...ops.list_rank import check_lists, check_values
from .. import core, links
from ..declare import listwise


@listwise(
    source="arXiv 2405.14103, arXiv 2403.07230",
    status="loss form second-hand; which pairs to form is not part of it",
    reference=True,
)
def soft_pairs(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    pairs: Tensor,  # [M, 2]
    pref_prob: Tensor,  # [M]
    beta: float = 0.1,
) -> Tensor:  # [G]
    """Logistic loss of named pairs with soft labels.

    l = sum over pairs (i, j) of q softplus(-(s_i - s_j)) + (1 - q) softplus(s_i - s_j),
    s = beta logratio

    The pair form of online self-preferring (arXiv 2405.14103), and with q = 1 of a curriculum over
    ranked lists (arXiv 2403.07230); which pairs are formed is the caller's.

    Args:
        relevance: `[S]` read for NaN only: a pair with a left-out answer is dropped.
        pairs: `[M, 2]` integer positions on the sequence axis, both in one list.
        pref_prob: `[M]` q in [0, 1] that the first of the pair is better.

    Returns:
        Unreduced loss `[G]`, the sum over a list's pairs.
    """
    core.positive("beta", beta)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"pairs must be integers [M, 2] (positions of two answers), got {pairs.dtype} "
            f"{list(pairs.shape)}."
        )
    check_lists(scores, relevance, cu_groups)
    if checks.readable(cu_groups):
        check_values(relevance, cu_groups)
    core.integers("pairs", pairs, 0, scores.numel() - 1, "positions of two answers")
    first, second = pairs.long().unbind(1)
    score = beta * torch.where(relevance.isnan(), 0.0, scores)
    margin = score[first] - score[second]
    q = core.data("pref_prob", pref_prob, margin)
    core.probability("pref_prob", q)
    values = links.logistic(margin, q, 1.0 - q)
    kept = ~(relevance.isnan()[first] | relevance.isnan()[second])
    group = ragged.owner(cu_groups, scores.numel())[first]
    total = scores.new_zeros(cu_groups.numel() - 1)
    return total.index_add(0, group, torch.where(kept, values, 0.0))
