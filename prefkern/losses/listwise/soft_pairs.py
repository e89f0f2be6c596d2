"""An explicit list of pairs, each with the probability that its first answer is better."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import core, links
from ..record import Loss
from ..weights.token_weights import sequence_of


def soft_pairs(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
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
        scores: `[S]` log-ratio of each response.
        labels: `[S]` read for NaN only: a pair with a removed response is dropped.
        cu_groups: `[G+1]` boundaries of the lists.
        pairs: `[M, 2]` integer positions on the sequence axis, both in one list.
        pref_prob: `[M]` q in [0, 1] that the first of the pair is better.
        beta: Strength of the pull to the reference, > 0, default 0.1.

    Returns:
        Unreduced loss `[G]`, the sum over a list's pairs.

    Raises:
        ValueError: beta <= 0, pairs that are not `[M, 2]` integers, pref_prob that is not `[M]`.
    """
    core.positive("beta", beta)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"pairs must be integers [M, 2] (positions of two responses), got {pairs.dtype} "
            f"{list(pairs.shape)}."
        )
    first, second = pairs.long().unbind(1)
    score = beta * torch.where(labels.isnan(), 0.0, scores)
    margin = score[first] - score[second]
    q = core.data("pref_prob", pref_prob, margin)
    values = links.logistic(margin, q, 1.0 - q)
    kept = ~(labels.isnan()[first] | labels.isnan()[second])
    group = sequence_of(cu_groups, scores)[first]
    total = scores.new_zeros(cu_groups.numel() - 1)
    return total.index_add(0, group, torch.where(kept, values, 0.0))


SOFT_PAIRS = Loss(
    soft_pairs,
    "soft_pairs",
    "listwise",
    needs_reference=True,
    extra=("pairs", "pref_prob"),
    status="loss form second-hand; which pairs to form is not part of it",
    source="arXiv 2405.14103, arXiv 2403.07230",
    rewards=core.logratio_rewards,
)
