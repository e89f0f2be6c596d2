"""plackett_luce: likelihoods of choices, one log sum exp per stage.

Stage i has members j (and i itself) and adds f_i (LSE_j s_j - s_i); the derivative is
u_j = sum_{i != j} f_i softmax_i(j) - f_j (the sum of the others' softmax_j): no difference
1 - softmax that would leave a sure item no digit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .list_blocks import (
    exp2m1,
    group_facts,
    load_items,
    log1p,
    store_items,
    store_loss,
    zero_outside,
)

# Bits of `flags`. Without STABLE and BRESLOW ties are strict.
STABLE, BRESLOW, GAIN, TOPK = (tl.constexpr(1 << bit) for bit in range(4))


@triton.jit
def _members(y_i, y_j, i, j, flags):
    """Whether j, another item than i, stands for choice at stage i; shapes broadcast."""
    tied = tl.where((flags & BRESLOW) != 0, i != j, i < j)
    tied = tl.where((flags & (STABLE | BRESLOW)) != 0, tied, False)
    return (y_j < y_i) | ((y_j == y_i) & tied)


@triton.jit(do_not_specialize=["stride", "flags"])
def list_choices_kernel(
    scores,  # [S] fp64
    labels,  # [S] fp64
    cu_groups,  # [G+1] int32
    topk,  # [G] int64 with the flag TOPK, else never read
    scratch,  # [3, S] fp64: of a stage, greatest value, f_i over the sum, own derivative
    loss,  # [G] fp64
    slope,  # [S] fp64
    stride: tl.int64,  # S
    flags,
    BLOCK: tl.constexpr,
):
    g = tl.program_id(0)
    start = tl.load(cu_groups + g).to(tl.int64)
    size = (tl.load(cu_groups + g + 1) - start).to(tl.int32)
    _count, broken, _high = group_facts(scores, labels, start, size, BLOCK)
    zero_outside(slope, cu_groups, stride, BLOCK)
    tops = scratch + start
    shares, owns = tops + stride, tops + 2 * stride
    stages = tl.full((), 0x7FFFFFFF, tl.int64)
    if (flags & TOPK) != 0:
        stages = tl.load(topk + g)
    loss_rows = tl.zeros((BLOCK,), tl.float64)
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        s_i, y_i, v_i = load_items(scores, labels, start, i, size)
        before = tl.zeros((BLOCK,), tl.int32)
        top = s_i
        for c in range(0, size, BLOCK):
            j = c + tl.arange(0, BLOCK)
            s_j, y_j, v_j = load_items(scores, labels, start, j, size)
            both = v_i[:, None] & v_j[None, :]
            member = _members(y_i[:, None], y_j[None, :], i[:, None], j[None, :], flags) & both
            top = tl.maximum(top, tl.max(tl.where(member, s_j[None, :], -float("inf")), 1))
            tied = (y_j[None, :] == y_i[:, None]) & (j[None, :] < i[:, None])
            tied = tl.where((flags & STABLE) != 0, tied, False)
            first = ((y_j[None, :] > y_i[:, None]) | tied) & v_j[None, :]
            before += tl.sum(first.to(tl.int32), 1)
        rest = tl.zeros((BLOCK,), tl.float64)
        for c in range(0, size, BLOCK):
            j = c + tl.arange(0, BLOCK)
            s_j, y_j, v_j = load_items(scores, labels, start, j, size)
            both = v_i[:, None] & v_j[None, :]
            member = _members(y_i[:, None], y_j[None, :], i[:, None], j[None, :], flags) & both
            e = tl.exp(tl.where(member, s_j[None, :] - top[:, None], -float("inf")))
            rest += tl.sum(e, 1)
        stage = v_i & (before < stages)
        factor = stage.to(tl.float64)
        if (flags & GAIN) != 0:
            factor = tl.where(stage, exp2m1(y_i), 0.0)
        mine = tl.exp(s_i - top)
        # The greatest value is off first and its own 1 stays out of the logarithm.
        excess = log1p(tl.where(mine == 1.0, rest, mine + rest - 1.0)) + (top - s_i)
        loss_rows += tl.where(stage, factor * excess, 0.0)
        share = factor / (mine + rest)
        tl.store(tops + i, top, mask=i < size)
        tl.store(shares + i, share, mask=i < size)
        tl.store(owns + i, -rest * share, mask=i < size)
    store_loss(loss, g, tl.sum(loss_rows, 0), broken)
    tl.debug_barrier()
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        s_i, y_i, v_i = load_items(scores, labels, start, i, size)
        u = tl.load(owns + i, mask=i < size, other=0.0)
        for c in range(0, size, BLOCK):
            j = c + tl.arange(0, BLOCK)
            _, y_j, v_j = load_items(scores, labels, start, j, size)
            top = tl.load(tops + j, mask=j < size, other=0.0)
            share = tl.load(shares + j, mask=j < size, other=0.0)
            # the row is the item, the column the stage
            member = _members(y_j[None, :], y_i[:, None], j[None, :], i[:, None], flags)
            member = member & v_i[:, None] & v_j[None, :]
            e = tl.exp(tl.where(member, s_i[:, None] - top[None, :], -float("inf")))
            u += tl.sum(e * share[None, :], 1)
        store_items(slope, start, i, size, u, v_i, broken)
