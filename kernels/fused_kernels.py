"""Fully fused head: product and online statistics in one kernel, no logit ever in memory.

A program holds BLOCK_M rows and walks over one share of the vocabulary, BLOCK_V columns at a time:
tl.dot over the hidden size into fp32 accumulators, then the statistics of that block in registers.
It writes the numbers that a fold kernel writes for a chunk, one chunk
per share, and the same merge puts the shares together: no atomics, no locks, the same bits always.

Precision of the products: 16-bit operands are multiplied exactly and added in fp32 on tensor cores.
fp32 operands ask for "ieee": Triton's default would round them to tf32 (10 bits), and a logit of 20
nats would be off by 1e-2. A statistic that (a library product plus fold) takes from logits rounded
to the working dtype is taken from rounded accumulators here too, so that both agree to a few units
in the last place, and so do a policy and a reference that go different ways.

Operands are read through pointers: tensor descriptors compile in Triton 3.6 and 3.9 alike, but they
need rows that are multiples of 16 bytes and a device allocator that Triton must be given, for
one instruction (the bulk copy) on one vendor's two newest generations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import INTERPRETED, narrow, safe, shape, weighted, widen

# What a kernel rounds to the working dtype: see _fold_one.
SEEN = tl.constexpr(1)
ALL = tl.constexpr(2)


@triton.jit
def _place(row_blocks, shares, GROUP: tl.constexpr):
    """(row block, share) of this program. GROUP row blocks pass over the whole vocabulary before
    the next GROUP: their hidden states stay in the L2 cache, weights stream once per group."""
    pid = tl.program_id(0)
    group = pid // (GROUP * shares)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inner = pid - group * GROUP * shares
    return first + inner % size, inner // size


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:
        # its dot multiplies the bit patterns of bfloat16; in fp32 the products are the same numbers
        a, b = widen(a, tl.float32), widen(b, tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _product(h_ptr, w_ptr, rows, cols, h_stride, w_stride, D,
             BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """hidden[rows] @ weight[cols].T in fp32."""
    d = tl.arange(0, BLOCK_D)
    h_at = h_ptr + rows[:, None] * h_stride + d[None, :]
    w_at = w_ptr + cols[None, :] * w_stride + d[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_D):
        ok = d < D - k
        h = tl.load(h_at, mask=ok[None, :], other=0.0)
        w = tl.load(w_at, mask=ok[:, None], other=0.0)
        acc = _dot(h, w, acc)
        h_at += BLOCK_D
        w_at += BLOCK_D
    return acc


@triton.jit
def _products(h_ptr, g_ptr, w_ptr, rows, cols, h_stride, g_stride, w_stride, D,
              BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Two products with one head: every block of weights is read once."""
    d = tl.arange(0, BLOCK_D)
    h_at = h_ptr + rows[:, None] * h_stride + d[None, :]
    g_at = g_ptr + rows[:, None] * g_stride + d[None, :]
    w_at = w_ptr + cols[None, :] * w_stride + d[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    ref = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_D):
        ok = d < D - k
        h = tl.load(h_at, mask=ok[None, :], other=0.0)
        g = tl.load(g_at, mask=ok[None, :], other=0.0)
        w = tl.load(w_at, mask=ok[:, None], other=0.0)
        acc = _dot(h, w, acc)
        ref = _dot(g, w, ref)
        h_at += BLOCK_D
        g_at += BLOCK_D
        w_at += BLOCK_D
    return acc, ref


@triton.jit
def _quarters(x, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    """Four runs of columns. A block's statistics go through registers one run at a time: a whole
    block of 128 x 256 in all its intermediate forms is 2.5 kB of spills per thread."""
    low, high = _halves(x, BLOCK_M, BLOCK_V)
    a, b = _halves(low, BLOCK_M, BLOCK_V // 2)
    c, d = _halves(high, BLOCK_M, BLOCK_V // 2)
    return a, b, c, d


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_V // 2)), (0, 2, 1)))


@triton.jit
def _logits(x, bias_ptr, bias_size, cols, factor, top, inside):
    """bias_size 0: no bias. Columns and rows that do not count are -inf."""
    x += tl.load(bias_ptr + cols, mask=cols < bias_size, other=0.0)[None, :]
    return tl.where(inside, shape(x, factor, top), float("-inf"))


@triton.jit
def _raise(m, total, z):
    """(new maximum, factor and shift of sums relative to the old one, z - max, e^(z - max))."""
    new = tl.maximum(m, tl.max(z, axis=1))
    base = safe(new)
    factor = tl.exp(m - base)
    shift = tl.where(total == 0, 0.0, safe(m) - base)
    x = z - base[:, None]
    return new, factor, shift, x, tl.exp(x)


@triton.jit
def _normaliser(m, total, z):
    new, factor, _shift, _x, e = _raise(m, total, z)
    return new, total * factor + tl.sum(e, axis=1)


@triton.jit
def _rounded(x, like_ptr):
    """The accumulators as a tile in the working dtype would hold them."""
    return widen(narrow(x, like_ptr.dtype.element_ty), tl.float32)


@triton.jit
def _fold_one(acc, state, v, begin, end, y, work_ptr, bias_ptr, bias_size, factor, top, rounds,
              V, FULL: tl.constexpr):  # fmt: skip
    """`state` (numbers per row) after the columns [v, v + width of acc)."""
    # rounds: 0 nothing is rounded, SEEN normaliser of rounded products too, ALL everything
    m, total, zy, sum_x, sum_sq, sum_z, count, first, seen, seen_total = state
    cols = v + tl.arange(0, acc.shape[1])
    inside = (y >= 0)[:, None] & (cols < end)[None, :]
    if FULL:
        if rounds == SEEN:
            kept = _rounded(acc, work_ptr)
            z = _logits(kept, bias_ptr, bias_size, cols, factor, top, inside)
            seen, seen_total = _normaliser(seen, seen_total, z)
        if rounds == ALL:
            acc = _rounded(acc, work_ptr)
    else:
        acc = _rounded(acc, work_ptr)
    z = _logits(acc, bias_ptr, bias_size, cols, factor, top, inside)
    zy += tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), axis=1)
    new, fall, shift, x, e = _raise(m, total, z)
    if FULL:
        sum_x = fall * (sum_x + shift * total) + tl.sum(weighted(e, x), axis=1)
        sum_sq = fall * fall * sum_sq + tl.sum(e * e, axis=1)
        finite = z > float("-inf")
        sum_z += tl.sum(tl.where(finite, z, 0.0), axis=1)
        count += tl.sum(tl.where(finite, 1.0, 0.0), axis=1)
        place = tl.min(tl.where(z == new[:, None], cols[None, :] - begin, V), axis=1)
        first = tl.where(new > m, place, first)
    total = total * fall + tl.sum(e, axis=1)
    return new, total, zy, sum_x, sum_sq, sum_z, count, first, seen, seen_total


@triton.jit
def _put(fields_ptr, index: tl.constexpr, field_stride, at, value, mask):
    tl.store(fields_ptr + index * field_stride + at, value, mask=mask)


@triton.jit(do_not_specialize=["M", "V", "bias_size", "field_stride", "chunk_stride", "rounds"])
def fused_one(
    h_ptr, w_ptr, bias_ptr, targets_ptr, params_ptr, fields_ptr, at_target_ptr,
    M, V, D, bias_size, h_stride: tl.int64, w_stride: tl.int64, share, field_stride: tl.int64,
    chunk_stride: tl.int64, rounds,
    FULL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fields of one model: max, sum, and with FULL also x, sq, z_sum, z_count, top, round_*."""
    row_block, chunk = _place(tl.cdiv(M, BLOCK_M), tl.cdiv(V, share), 16)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < M
    # rows and columns beyond the end repeat the last one: their loads need no mask
    read = tl.minimum(rows, M - 1).to(tl.int64)
    y = tl.load(targets_ptr + read).to(tl.int32)
    factor, top = tl.load(params_ptr), tl.load(params_ptr + 1)
    begin = chunk * share
    end = tl.minimum(begin + share, V)
    low = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.zeros((BLOCK_M,), tl.int32)
    state = (low, zero, zero, zero, zero, zero, zero, first, low, zero)
    for v in range(begin, end, BLOCK_V):
        cols = tl.minimum(v + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        acc = _product(h_ptr, w_ptr, read, cols, h_stride, w_stride, D,
                       BLOCK_M, BLOCK_V, BLOCK_D)  # fmt: skip
        parts = _quarters(acc, BLOCK_M, BLOCK_V)
        for i in tl.static_range(4):
            state = _fold_one(parts[i], state, v + i * (BLOCK_V // 4), begin, end, y, h_ptr,
                              bias_ptr, bias_size, factor, top, rounds, V, FULL)  # fmt: skip
    m, total, zy, sum_x, sum_sq, sum_z, count, first, seen, seen_total = state
    at = chunk.to(tl.int64) * chunk_stride + rows
    _put(fields_ptr, 0, field_stride, at, m, row_ok)
    _put(fields_ptr, 1, field_stride, at, total, row_ok)
    if FULL:
        _put(fields_ptr, 2, field_stride, at, sum_x, row_ok)
        _put(fields_ptr, 3, field_stride, at, sum_sq, row_ok)
        _put(fields_ptr, 4, field_stride, at, sum_z, row_ok)
        _put(fields_ptr, 5, field_stride, at, count, row_ok)
        _put(fields_ptr, 6, field_stride, at, first.to(tl.float32), row_ok)
        _put(fields_ptr, 7, field_stride, at, seen, row_ok)
        _put(fields_ptr, 8, field_stride, at, seen_total, row_ok)
    tl.store(at_target_ptr + rows, zy, mask=row_ok & (y >= begin) & (y < end))


@triton.jit
def _fold_two(acc, ref, state, v, end, y, work_ptr, bias_ptr, bias_size, ref_bias_ptr,
              ref_bias_size, factor, top, ref_factor, ref_top, rounds):  # fmt: skip
    m, total, mr, total_r, ref_cross, pol_cross, zy, ref_zy, rest = state
    seen, seen_total, seen_r, seen_total_r = rest
    cols = v + tl.arange(0, acc.shape[1])
    inside = (y >= 0)[:, None] & (cols < end)[None, :]
    if rounds == SEEN:
        kept = _rounded(acc, work_ptr)
        z = _logits(kept, bias_ptr, bias_size, cols, factor, top, inside)
        seen, seen_total = _normaliser(seen, seen_total, z)
        kept = _rounded(ref, work_ptr)
        z = _logits(kept, ref_bias_ptr, ref_bias_size, cols, ref_factor, ref_top, inside)
        seen_r, seen_total_r = _normaliser(seen_r, seen_total_r, z)
    z = _logits(acc, bias_ptr, bias_size, cols, factor, top, inside)
    zr = _logits(ref, ref_bias_ptr, ref_bias_size, cols, ref_factor, ref_top, inside)
    target = cols[None, :] == y[:, None]
    zy += tl.sum(tl.where(target, z, 0.0), axis=1)
    ref_zy += tl.sum(tl.where(target, zr, 0.0), axis=1)
    m, fall, shift, x, e = _raise(m, total, z)
    mr, fall_r, shift_r, xr, er = _raise(mr, total_r, zr)
    d = xr - x
    ref_cross = fall_r * (ref_cross + (shift_r - shift) * total_r)
    ref_cross += tl.sum(weighted(er, d), axis=1)
    pol_cross = fall * (pol_cross + (shift - shift_r) * total)
    pol_cross -= tl.sum(weighted(e, d), axis=1)
    total = total * fall + tl.sum(e, axis=1)
    total_r = total_r * fall_r + tl.sum(er, axis=1)
    rest = (seen, seen_total, seen_r, seen_total_r)
    return m, total, mr, total_r, ref_cross, pol_cross, zy, ref_zy, rest


@triton.jit(do_not_specialize=[
    "M", "V", "bias_size", "ref_bias_size", "field_stride", "chunk_stride", "target_stride",
    "rounds",
])  # fmt: skip
def fused_two(
    h_ptr, w_ptr, bias_ptr, g_ptr, u_ptr, ref_bias_ptr, targets_ptr, params_ptr, fields_ptr,
    at_target_ptr,
    M, V, D, Dr, bias_size, ref_bias_size, h_stride: tl.int64, w_stride: tl.int64,
    g_stride: tl.int64, u_stride: tl.int64, share, field_stride: tl.int64, chunk_stride: tl.int64,
    target_stride: tl.int64, rounds,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first ten fields of two models. g, u: the reference's hidden states and head; SHARED:
    u is w, and one block of weights serves both products."""
    row_block, chunk = _place(tl.cdiv(M, BLOCK_M), tl.cdiv(V, share), 16)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < M
    read = tl.minimum(rows, M - 1).to(tl.int64)
    y = tl.load(targets_ptr + read).to(tl.int32)
    factor, top = tl.load(params_ptr), tl.load(params_ptr + 1)
    ref_factor, ref_top = tl.load(params_ptr + 2), tl.load(params_ptr + 3)
    begin = chunk * share
    end = tl.minimum(begin + share, V)
    low = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    rest = (low, zero, low, zero)
    state = (low, zero, low, zero, zero, zero, zero, zero, rest)
    for v in range(begin, end, BLOCK_V):
        cols = tl.minimum(v + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        if SHARED:
            acc, ref = _products(h_ptr, g_ptr, w_ptr, read, cols, h_stride, g_stride, w_stride, D,
                                 BLOCK_M, BLOCK_V, BLOCK_D)  # fmt: skip
        else:
            acc = _product(h_ptr, w_ptr, read, cols, h_stride, w_stride, D,
                           BLOCK_M, BLOCK_V, BLOCK_D)  # fmt: skip
            ref = _product(g_ptr, u_ptr, read, cols, g_stride, u_stride, Dr,
                           BLOCK_M, BLOCK_V, BLOCK_D)  # fmt: skip
        parts = _quarters(acc, BLOCK_M, BLOCK_V)
        ref_parts = _quarters(ref, BLOCK_M, BLOCK_V)
        for i in tl.static_range(4):
            state = _fold_two(
                parts[i], ref_parts[i], state, v + i * (BLOCK_V // 4), end, y, h_ptr, bias_ptr,
                bias_size, ref_bias_ptr, ref_bias_size, factor, top, ref_factor, ref_top, rounds,
            )  # fmt: skip
    m, total, mr, total_r, ref_cross, pol_cross, zy, ref_zy, rest = state
    seen, seen_total, seen_r, seen_total_r = rest
    at = chunk.to(tl.int64) * chunk_stride + rows
    _put(fields_ptr, 0, field_stride, at, m, row_ok)
    _put(fields_ptr, 1, field_stride, at, total, row_ok)
    _put(fields_ptr, 2, field_stride, at, mr, row_ok)
    _put(fields_ptr, 3, field_stride, at, total_r, row_ok)
    _put(fields_ptr, 4, field_stride, at, ref_cross, row_ok)
    _put(fields_ptr, 5, field_stride, at, pol_cross, row_ok)
    _put(fields_ptr, 6, field_stride, at, seen, row_ok)
    _put(fields_ptr, 7, field_stride, at, seen_total, row_ok)
    _put(fields_ptr, 8, field_stride, at, seen_r, row_ok)
    _put(fields_ptr, 9, field_stride, at, seen_total_r, row_ok)
    here = row_ok & (y >= begin) & (y < end)
    tl.store(at_target_ptr + rows, zy, mask=here)
    tl.store(at_target_ptr + target_stride + rows, ref_zy, mask=here)
