"""ADPO: DPO's comparison made segment by segment, with the sum outside the log-sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import ragged
from ...stats import TokenStats
from .. import core, links
from .. import tokens as token
from ..declare import tokenwise
from ..weights.steps import STEPS


@tokenwise(
    source="arXiv 2602.09533",
    status="provisional: loss from the abstract and notes, which agree; what answers of unequal "
    "numbers of segments do was not read",
    reference=True,
)
def adpo(
    tokens: TokenStats,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    scored: Tensor,  # [N]
    cu_groups: Tensor,  # [P+1]
    step_index: Tensor | None = None,  # [N]
    cu_segments: Tensor | None = None,  # [M+1]
    beta: float = 0.1,
) -> Tensor:  # [S]
    """ADPO: a logistic loss for every pair of segments of the two answers.

    l = sum_i softplus(-beta (s_i(chosen) - s_i(rejected))),  s_i = log-ratio of segment i

    Oi et al. 2026 (arXiv 2602.09533): windows of k tokens, or m parts of each answer. One segment
    each is DPO, one per token the finest. A segment that the other answer does not have is compared
    with 0, the log-ratio of nothing: a choice of this package.

    Args:
        cu_groups: `[P+1]` boundaries of the pairs on the sequence axis, each (chosen, rejected).
        step_index: `[N]` integers, the segment a token belongs to, from 1; 0 leaves it out. Or
        cu_segments: `[M+1]` boundaries of the segments on the token axis, the sequences' own among
            them.

    Returns:
        `[S]` fp64, the pair's loss at both of its answers: the mean over sequences is the mean over
        pairs. A pair without tokens gives 0.

    Raises:
        ValueError: not one of step_index and cu_segments, groups that are no pairs (checked on the
            CPU; elsewhere they give NaN).
    """
    core.positive("beta", beta)
    logp = token.field(tokens, "logp", scored)
    rho = (logp - token.field(tokens, "ref_logp", scored)).double()
    index = _segments(step_index, cu_segments, cu_seqlens, scored)
    n, pairs = scored.numel(), cu_groups.numel() - 1
    sizes = cu_groups.diff()
    readable = sizes.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and bool((sizes != 2).any()):
        raise ValueError(
            f"cu_groups must hold pairs (chosen, rejected), got groups of {sizes.tolist()} answers."
        )
    answers = cu_seqlens.numel() - 1
    answer = torch.arange(answers, device=scored.device)
    held = (answer >= cu_groups[0]) & (answer < cu_groups[-1])
    group = ragged.owner(cu_groups, answers).clamp(max=max(pairs - 1, 0))
    chosen = answer == cu_groups.long()[group]
    owner = ragged.owner(cu_seqlens, n).clamp(max=max(answers - 1, 0))  # of each token
    counted = scored & (index > 0) & held[owner]
    # one place per (pair, segment); the number of segments never exceeds the number of tokens
    place = ragged.distinct(group[owner] * (n + 1) + index.clamp(max=n))
    signed = torch.where(chosen[owner], rho, -rho)
    gap = rho.new_zeros(n).index_add(0, place, torch.where(counted, signed, 0.0))
    there = rho.new_zeros(n).index_add(0, place, counted.double()) > 0
    pair = torch.zeros_like(place).index_put((place,), group[owner])
    each = torch.where(there, links.logistic(beta * gap), 0.0)
    found = rho.new_zeros(pairs).index_add(0, pair, each)
    found = torch.where(sizes == 2, found, torch.nan)
    return torch.where(held, found[group], 0.0)


def _segments(
    step_index: Tensor | None, cu_segments: Tensor | None, cu_seqlens: Tensor, scored: Tensor
) -> Tensor:  # [N] int64
    """The segment of every token within its answer, from 1."""
    if (step_index is None) == (cu_segments is None):
        raise ValueError(
            "adpo compares segments: pass step_index [N] or cu_segments [M+1], one of the two (the "
            "trainer: --step-pattern, --step-size, --step-count or a column step_index)."
        )
    if step_index is not None:
        core.same_shape("step_index", step_index, "scored", scored)
        core.integers("step_index", step_index, 0, scored.numel(), STEPS)
        return step_index.long()
    assert cu_segments is not None
    n = scored.numel()
    number = ragged.owner(cu_segments, n)
    sequence = ragged.owner(cu_seqlens, n).clamp(max=cu_seqlens.numel() - 2)
    start = cu_seqlens[:-1].long().clamp(max=max(n - 1, 0))
    return number - number[start][sequence] + 1
