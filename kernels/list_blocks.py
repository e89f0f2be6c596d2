"""Pieces that the ranking kernels share.

One program owns one group and walks over it in blocks of BLOCK rows i and, inside, BLOCK columns j;
every row sums over all columns in both roles, so no output has two writers. Arithmetic is fp64, as
in the C++ twin, for fp32 scores too: results are rounded once. What rows need to know of each other
goes through a few numbers per item in global memory, with a barrier of the program in between. A
block of booleans meets a scalar one in tl.where alone: the interpreter has no `&` for that mixture.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_items(
    scores, labels, start, i, size
):  # -> score, label (0 where masked), valid: each [BLOCK]
    inside = i < size
    label = tl.load(labels + start + i, mask=inside, other=float("nan"))
    score = tl.load(scores + start + i, mask=inside, other=0.0)
    valid = label == label
    return tl.where(valid, score, 0.0), tl.where(valid, label, 0.0), valid


@triton.jit
def group_facts(scores, labels, start, size, BLOCK: tl.constexpr):
    """Valid items, whether a score or label of theirs is not finite, the greatest label."""
    count = tl.zeros((BLOCK,), tl.int32)
    broken = tl.zeros((BLOCK,), tl.int32)
    high = tl.full((BLOCK,), -float("inf"), tl.float64)
    for r in range(0, size, BLOCK):
        s, y, valid = load_items(scores, labels, start, r + tl.arange(0, BLOCK), size)
        count += valid.to(tl.int32)
        broken |= (valid & ((s - s != 0.0) | (y - y != 0.0))).to(tl.int32)
        high = tl.where(valid & (y > high), y, high)
    return tl.sum(count, 0), tl.max(broken, 0) != 0, tl.max(high, 0)


@triton.jit
def store_items(slope, start, i, size, u, valid, broken):
    """Derivatives of rows i; a number that is not finite makes all of its group NaN."""
    u = tl.where(broken, float("nan"), u)
    u = tl.where(valid, u, 0.0)
    tl.store(slope + start + i, u, mask=i < size)


@triton.jit
def zero_outside(slope, cu_groups, items, BLOCK: tl.constexpr):
    """Slope 0 of the items that no group holds, a share of them by every program."""
    before = tl.load(cu_groups)
    after = tl.load(cu_groups + tl.num_programs(0))
    outside = before + items.to(tl.int32) - after
    for first in range(tl.program_id(0) * BLOCK, outside, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        place = tl.where(i < before, i, i - before + after)
        tl.store(slope + place, tl.zeros((BLOCK,), tl.float64), mask=i < outside)


@triton.jit
def store_loss(loss, g, value, broken):
    value = tl.where(broken, float("nan"), value)
    tl.store(loss + g, value)


@triton.jit
def ahead(v_a, v_b, a, b):
    """Whether item a comes before item b: greater first, equal ones by position."""
    return (v_a > v_b) | ((v_a == v_b) & (a < b))


@triton.jit
def rank_of(scores, labels, start, size, v_i, i, BY_SCORE, BLOCK: tl.constexpr):
    """1-based ranks of rows i among the valid items, by score or by label, as fp64 [BLOCK]."""
    rank = tl.full((BLOCK,), 1.0, tl.float64)
    for c in range(0, size, BLOCK):
        j = c + tl.arange(0, BLOCK)
        s, y, valid = load_items(scores, labels, start, j, size)
        v_j = tl.where(BY_SCORE, s, y)
        before = ahead(v_j[None, :], v_i[:, None], j[None, :], i[:, None]) & valid[None, :]
        rank += tl.sum(before.to(tl.float64), 1)
    return rank


@triton.jit
def log_base(base2):
    """ln b of the discount 1 / log_b(1 + rank): ln 2 or 1, as fp64."""
    one = tl.full((), 1.0, tl.float64)
    return tl.where(base2, one * LN2, one)


@triton.jit
def discount(rank, base, topn):
    """base / log(1 + rank), 0 beyond topn (0: no limit)."""
    return tl.where((topn > 0) & (rank > topn), 0.0, base / tl.log(1.0 + rank))


@triton.jit
def log1p(x):
    """log(1 + x), x >= 0 and finite: what rounding 1 + x lost comes back to first order."""
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) / u


@triton.jit
def expm1_series(x):
    """e^x - 1 for |x| <= 0.35: Taylor up to x^14 / 14!, 2e-18 short."""
    t = 1.0 + x * (1.0 / 14)
    t = 1.0 + x * (1.0 / 13) * t
    t = 1.0 + x * (1.0 / 12) * t
    t = 1.0 + x * (1.0 / 11) * t
    t = 1.0 + x * (1.0 / 10) * t
    t = 1.0 + x * (1.0 / 9) * t
    t = 1.0 + x * (1.0 / 8) * t
    t = 1.0 + x * (1.0 / 7) * t
    t = 1.0 + x * (1.0 / 6) * t
    t = 1.0 + x * (1.0 / 5) * t
    t = 1.0 + x * (1.0 / 4) * t
    t = 1.0 + x * (1.0 / 3) * t
    t = 1.0 + x * (1.0 / 2) * t
    return x * t


@triton.jit
def exp2m1(y):
    """2^y - 1 without cancellation near 0."""
    x = y * LN2
    near = tl.abs(x) < 0.35
    return tl.where(near, expm1_series(tl.where(near, x, 0.0)), tl.exp2(y) - 1.0)


@triton.jit
def logistic(x):
    """(softplus(-x), sigmoid(-x)) by one exponential of a number <= 0."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, -x, 0.0) + log1p(e), tl.where(x > 0.0, e * r, r)
