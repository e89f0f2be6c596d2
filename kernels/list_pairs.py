"""pair: sums over the strict pairs of a group."""

from __future__ import annotations

import triton
import triton.language as tl

from .list_blocks import (
    LN2,
    discount,
    exp2m1,
    expm1_series,
    group_facts,
    load_items,
    log_base,
    logistic,
    rank_of,
    store_items,
    store_loss,
    zero_outside,
)

# Bits of `flags`: an option costs a select or a branch, not a kernel of its own.
LINEAR, BASE2, DCG2, NORMALIZE, BY_SCORE, AVERAGE, MEAN, BY_SIZE = (
    tl.constexpr(1 << bit) for bit in range(8)
)
LABELDIFF, LAMBDA = (tl.constexpr(1 << bit) for bit in (8, 9))


@triton.jit
def _strict_pairs(scores, labels, start, size, BLOCK: tl.constexpr):
    """Number of pairs with y_i > y_j, as fp64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for r in range(0, size, BLOCK):
        _, y_i, v_i = load_items(scores, labels, start, r + tl.arange(0, BLOCK), size)
        for c in range(0, size, BLOCK):
            _, y_j, v_j = load_items(scores, labels, start, c + tl.arange(0, BLOCK), size)
            strict = (y_i[:, None] > y_j[None, :]) & v_i[:, None] & v_j[None, :]
            total += tl.sum(strict.to(tl.float64), 1)
    return tl.sum(total, 0)


@triton.jit
def _places(scores, labels, start, size, place, flags, topn, BLOCK: tl.constexpr):
    """Writes discounts (or ranks) of the group's items to place [size]; returns the ideal DCG."""
    base = log_base((flags & BASE2) != 0)
    by_score = (flags & BY_SCORE) != 0
    ideal = tl.zeros((BLOCK,), tl.float64)
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        s, y, valid = load_items(scores, labels, start, i, size)
        rank = rank_of(scores, labels, start, size, tl.where(by_score, s, y), i, by_score, BLOCK)
        value = tl.where((flags & DCG2) != 0, rank, discount(rank, base, topn))
        tl.store(place + i, value, mask=i < size)
        if (flags & NORMALIZE) != 0:
            best = rank_of(scores, labels, start, size, y, i, False, BLOCK)
            gain = tl.where((flags & LINEAR) != 0, y, exp2m1(y))
            ideal += tl.where(valid, gain * discount(best, base, topn), 0.0)
    return tl.sum(ideal, 0)


@triton.jit
def _average_places(scores, labels, start, size, place, mean, flags, BLOCK: tl.constexpr):
    """Writes to mean [size] the average of place over the items tied with each item."""
    by_score = (flags & BY_SCORE) != 0
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        s_i, y_i, _ = load_items(scores, labels, start, i, size)
        v_i = tl.where(by_score, s_i, y_i)
        total = tl.zeros((BLOCK,), tl.float64)
        tied = tl.zeros((BLOCK,), tl.float64)
        for c in range(0, size, BLOCK):
            j = c + tl.arange(0, BLOCK)
            s_j, y_j, valid = load_items(scores, labels, start, j, size)
            p_j = tl.load(place + j, mask=j < size, other=0.0)
            same = (tl.where(by_score, s_j, y_j)[None, :] == v_i[:, None]) & valid[None, :]
            total += tl.sum(tl.where(same, p_j[None, :], 0.0), 1)
            tied += tl.sum(same.to(tl.float64), 1)
        tl.store(mean + i, total / tl.where(tied > 0.0, tied, 1.0), mask=i < size)


@triton.jit
def _lambda_weight(y_i, y_j, p_i, p_j, ideal, flags):  # -> [BLOCK, BLOCK]
    """|G_i - G_j| / ideal * |D_i - D_j|, or with the discounts of rank differences (dcg2)."""
    apart = tl.abs(y_i[:, None] - y_j[None, :])
    # 2^max (1 - 2^-|difference|): close labels do not cancel.
    top = tl.where(y_i[:, None] > y_j[None, :], tl.exp2(y_i)[:, None], tl.exp2(y_j)[None, :])
    x = -apart * LN2
    near = x > -0.35
    less = tl.where(near, expm1_series(tl.where(near, x, 0.0)), tl.exp(x) - 1.0)
    gain = tl.where((flags & LINEAR) != 0, apart, top * -less) / ideal
    cost = tl.abs(p_i[:, None] - p_j[None, :])
    if (flags & DCG2) != 0:
        base = log_base((flags & BASE2) != 0)
        steps = tl.maximum(cost, 1.0)  # the diagonal, 0 apart, is no pair
        cost = discount(steps, base, 0) - discount(steps + 1.0, base, 0)
    return gain * cost


@triton.jit(do_not_specialize=["stride", "flags", "topn"])
def list_pairs_kernel(
    scores,  # [S] fp64
    labels,  # [S] fp64
    cu_groups,  # [G+1] int32
    scratch,  # [2, S] fp64; touched by LAMBDA alone
    loss,  # [G] fp64
    slope,  # [S] fp64
    stride: tl.int64,  # S
    flags,
    topn,
    BLOCK: tl.constexpr,
):
    g = tl.program_id(0)
    start = tl.load(cu_groups + g).to(tl.int64)
    size = (tl.load(cu_groups + g + 1) - start).to(tl.int32)
    count, broken, _high = group_facts(scores, labels, start, size, BLOCK)
    zero_outside(slope, cu_groups, stride, BLOCK)
    ideal = tl.full((), 1.0, tl.float64)
    place = scratch + start
    if (flags & LAMBDA) != 0:
        found = _places(scores, labels, start, size, place, flags, topn, BLOCK)
        ideal = tl.where(found == 0.0, 1.0, found)
        tl.debug_barrier()
        if (flags & AVERAGE) != 0:
            _average_places(scores, labels, start, size, place, place + stride, flags, BLOCK)
            tl.debug_barrier()
            place += stride
    factor = tl.full((), 1.0, tl.float64)
    if (flags & MEAN) != 0:
        factor = factor / tl.maximum(_strict_pairs(scores, labels, start, size, BLOCK), 1.0)
    if (flags & BY_SIZE) != 0:
        factor = factor * count.to(tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        s_i, y_i, v_i = load_items(scores, labels, start, i, size)
        u = tl.zeros((BLOCK,), tl.float64)
        for c in range(0, size, BLOCK):
            j = c + tl.arange(0, BLOCK)
            s_j, y_j, v_j = load_items(scores, labels, start, j, size)
            both = v_i[:, None] & v_j[None, :]
            over = (y_i[:, None] > y_j[None, :]) & both
            under = (y_i[:, None] < y_j[None, :]) & both
            gap = s_i[:, None] - s_j[None, :]
            gap = tl.where(under, -gap, gap)  # winner less loser
            weight = tl.full((BLOCK, BLOCK), 1.0, tl.float64)
            value, push = logistic(gap)
            if (flags & LABELDIFF) != 0:
                weight = tl.abs(y_i[:, None] - y_j[None, :])
            if (flags & LAMBDA) != 0:
                p_i = tl.load(place + i, mask=i < size, other=0.0)
                p_j = tl.load(place + j, mask=j < size, other=0.0)
                weight = _lambda_weight(y_i, y_j, p_i, p_j, ideal, flags)
            value, push = weight * value, weight * push
            total += tl.sum(tl.where(over, value, 0.0), 1)
            u += tl.sum(tl.where(under, push, 0.0) - tl.where(over, push, 0.0), 1)
        store_items(slope, start, i, size, u * factor, v_i, broken)
    store_loss(loss, g, tl.sum(total, 0) * factor, broken)
