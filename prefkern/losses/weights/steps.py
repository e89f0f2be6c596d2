"""Token weights from the steps of an answer, in the style of Tree-TPO.

Shapes: N packed tokens, S sequences, G lists, D hidden size. `scored` [N] is True where a token
counts (its target is not ignored); weights are exactly 0 elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import ragged
from ...ops.segment_sum import segment_sum
from .. import core
from ..record import TokenWeights

# At most the number of tokens: `_key` would run larger ones together.
STEPS = "the step of each token, from 1; 0 outside steps"


def tree_tpo(
    cu_seqlens: Tensor,  # [S+1]
    scored: Tensor,  # [N]
    step_index: Tensor,  # [N]
    cosine: Tensor,  # [N]
) -> TokenWeights:
    """Weights that turn a sum over tokens into a weighted mean of step means.

    w_t = c_k / (n_k sum_k' c_k'),  c_k = 1 + cosine of step k,  n_k its number of tokens

    In the style of Tree-TPO (arXiv 2410.12854); its equations were not read.

    Args:
        cu_seqlens: `[S+1]` boundaries of the sequences.
        scored: `[N]` bool, tokens that count.
        step_index: `[N]` integers, the step a token belongs to, from 1; 0 for none.
        cosine: `[N]` cosine in [-1, 1] of the token's step with the same step of the best answer,
            from `step_cosine`.

    Returns:
        Constant weights `[N]`; an answer without steps has weights 0.

    Raises:
        ValueError: shapes that differ, negative steps (checked on the CPU).
    """
    for name, value in (("step_index", step_index), ("cosine", cosine)):
        core.same_shape(name, value, "scored", scored)
    core.integers("step_index", step_index, 0, step_index.numel(), STEPS)
    core.real("cosine", cosine)
    counted = scored & (step_index > 0)
    owner = ragged.owner(cu_seqlens, scored.numel())
    step = ragged.distinct(_key(owner, step_index))
    size = torch.zeros_like(cosine, dtype=torch.float64).index_add(0, step, counted.double())
    share = torch.where(counted, (1.0 + cosine.double()) / size[step].clamp(min=1), 0.0)
    total = segment_sum(share, cu_seqlens)[owner]  # over a step's tokens it adds up to c_k
    return TokenWeights(torch.where(counted, share / torch.where(total > 0, total, 1.0), 0.0))


def step_cosine(
    states: Tensor,  # [N, D]
    cu_seqlens: Tensor,  # [S+1]
    cu_groups: Tensor,  # [G+1]
    relevance: Tensor,  # [S]
    scored: Tensor,  # [N]
    step_index: Tensor,  # [N]
) -> Tensor:  # [N]
    """Cosine of each step's mean hidden state with the same step of its list's best answer.

    The argument `cosine` of `tree_tpo`; the released code compares with the answer stored first,
    which is the best where answers are sorted. A step that the best answer does not have gets -1,
    and so the weight 0, as there.

    Args:
        states: `[N, D]` hidden states of the last layer. Constant.
        cu_seqlens: `[S+1]` boundaries of the sequences.
        cu_groups: `[G+1]` boundaries of the lists, on the sequence axis.
        relevance: `[S]` value of each answer; the first of the highest is the best, NaN is none.
        scored: `[N]` bool, tokens that count.
        step_index: `[N]` integers, the step a token belongs to, from 1; 0 for none.

    Returns:
        Constant `[N]` in the dtype of states (fp32 for narrower ones); -1 outside steps.

    Raises:
        ValueError: shapes that differ.
    """
    if states.dim() != 2 or scored.shape != states.shape[:1] or step_index.shape != scored.shape:
        raise ValueError(
            f"states must be [N, D], scored and step_index [N], got {list(states.shape)}, "
            f"{list(scored.shape)} and {list(step_index.shape)}."
        )
    sequences = cu_seqlens.numel() - 1
    if relevance.shape != (sequences,):
        raise ValueError(f"relevance must be [S] = [{sequences}], got {list(relevance.shape)}.")
    states = states.detach()
    if states.dtype in (torch.float16, torch.bfloat16):
        states = states.float()
    core.integers("step_index", step_index, 0, step_index.numel(), STEPS)
    counted = scored & (step_index > 0)
    owner = ragged.owner(cu_seqlens, scored.numel())
    group = ragged.owner(cu_groups, sequences)[owner]  # [N]
    best = ragged.first_best(relevance, cu_groups)[owner]  # [N] bool
    # Means over a step's tokens need no division: a cosine does not see lengths.
    own = ragged.distinct(_key(owner, step_index))
    n, width = states.shape
    total = states.new_zeros(n, width).index_add(0, own, torch.where(counted[:, None], states, 0.0))
    # The best answer's sum of the same step, under the key (list, step).
    shared = ragged.distinct(_key(group, step_index))
    from_best = counted & best
    wanted = states.new_zeros(n, width).index_add(
        0, shared, torch.where(from_best[:, None], states, 0.0)
    )
    there = torch.zeros_like(step_index, dtype=torch.bool).index_put(
        (shared[from_best],), torch.ones_like(from_best[from_best])
    )
    cosine = torch.nn.functional.cosine_similarity(total[own], wanted[shared], dim=1)
    return torch.where(counted & there[shared], cosine, -1.0)


def _key(owner: Tensor, step_index: Tensor) -> Tensor:  # [N] int64
    """One key per (owner, step); the number of steps never exceeds the number of tokens."""
    n = owner.numel()
    return owner * (n + 1) + step_index.long().clamp(max=n)
