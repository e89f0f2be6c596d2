"""Forward kernels: each reads a tile once and writes the sums of every (row, chunk) of it.

One program holds BLOCK_M rows and BLOCK_V columns, which are one chunk; fields and scalars are
listed in prefkern/backends/tiled/epilogue.py. Lanes beyond the tile or in rows that do not count
are -inf before any exp, so no masked lane can turn into NaN. Offsets of rows are 64-bit:
rows times columns can pass 2^31. Pointers that a call has no use for point anywhere; `flags` says
which are read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import blend, log1p, narrow, normaliser, shape, weighted, widen

# Bits of `flags`.
BIAS = tl.constexpr(1)
REF_BIAS = tl.constexpr(2)
KEEP = tl.constexpr(4)
VALUES = tl.constexpr(8)
THIRD = tl.constexpr(16)


@triton.jit
def load_bias(bias_ptr, cols, valid, w, present):
    """[BLOCK_V], 0 without a bias."""
    return tl.load(bias_ptr + cols, mask=valid & (cols < columns_if(present, w)), other=0.0)


@triton.jit
def columns_if(flag, w):
    """w, or 0 where a flag is not set: a bound that lets nothing through."""
    return tl.where(flag != 0, w, 0)


@triton.jit
def load_products(z_ptr, stride, rows, cols, inside, dtype: tl.constexpr):
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    return widen(tl.load(z_ptr + at, mask=inside, other=0.0), dtype)


@triton.jit
def logits(x, bias, factor, top, inside):
    return tl.where(inside, shape(x + bias[None, :], factor, top), float("-inf"))


@triton.jit
def round_to(x, dtype: tl.constexpr, ROUND: tl.constexpr):
    """Products as a backward reads them."""
    if ROUND:
        x = widen(narrow(x, dtype), x.dtype)
    return x


@triton.jit
def load_row(ptr, index: tl.constexpr, stride, rows, mask):
    """Row constants as a column [BLOCK_M, 1]."""
    return tl.load(ptr + index * stride + rows, mask=mask, other=0.0)[:, None]


@triton.jit
def in_top(seen, v, value, index):
    """The reference's top set: larger than the threshold, or equal and not after its index (a
    number of the fold dtype, exact up to V = 2^24)."""
    return (seen > value) | ((seen == value) & (v[None, :].to(seen.dtype) <= index))


@triton.jit
def _keep(keep_ptr, stride, rows, cols, x, written):
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(keep_ptr + at, narrow(x, keep_ptr.dtype.element_ty), mask=written)


@triton.jit
def _at_target(z_ptr, stride, bias_ptr, w, present, out_ptr, rows, column, hit, factor, top):
    """The logit of the target, for the rows whose target is in this chunk."""
    at = rows.to(tl.int64) * stride + column
    x = widen(tl.load(z_ptr + at, mask=hit, other=0.0), out_ptr.dtype.element_ty)
    x = x + load_bias(bias_ptr, column, hit, w, present)
    tl.store(out_ptr + rows, shape(x, factor, top), mask=hit)


@triton.jit
def _put(at_ptr, index: tl.constexpr, field_stride, value, mask):
    tl.store(at_ptr + index * field_stride, value, mask=mask)


@triton.jit
def _single(at_ptr, first: tl.constexpr, field_stride, mask, z, m, x, e, cols,
            BLOCK_V: tl.constexpr):  # fmt: skip
    """x, sq, z_sum, z_count, top from field `first` on."""
    _put(at_ptr, first, field_stride, tl.sum(weighted(e, x), axis=1), mask)
    _put(at_ptr, first + 1, field_stride, tl.sum(e * e, axis=1), mask)
    finite = z > float("-inf")
    _put(at_ptr, first + 2, field_stride, tl.sum(tl.where(finite, z, 0.0), axis=1), mask)
    _put(at_ptr, first + 3, field_stride, tl.sum(finite.to(tl.int32), axis=1), mask)
    largest = tl.where(z == m[:, None], cols[None, :], BLOCK_V)
    _put(at_ptr, first + 4, field_stride, tl.min(largest, axis=1), mask)


@triton.jit(do_not_specialize=["flags", "m", "v0"])
def fold_one(
    z_ptr, keep_ptr, bias_ptr, targets_ptr, params_ptr, fields_ptr, at_target_ptr,
    flags, m, w, v0, z_stride: tl.int64, keep_stride: tl.int64, field_stride: tl.int64,
    chunk_stride: tl.int64,
    FULL: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fields of one model. ROUND: the tile is wider than what the backward reads, keep_ptr."""
    dtype: tl.constexpr = fields_ptr.dtype.element_ty
    work: tl.constexpr = keep_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    local = tl.arange(0, BLOCK_V)
    cols = chunk * BLOCK_V + local
    row_ok, col_ok = rows < m, cols < w
    y = tl.load(targets_ptr + rows, mask=row_ok, other=-1)
    inside = (y >= 0)[:, None] & col_ok[None, :]
    factor, top = tl.load(params_ptr), tl.load(params_ptr + 1)
    bias = load_bias(bias_ptr, cols, col_ok, w, flags & BIAS)
    raw = load_products(z_ptr, z_stride, rows, cols, inside, dtype)
    z = logits(raw, bias, factor, top, inside)
    most, total, x, e = normaliser(z)
    at_ptr = fields_ptr + chunk * chunk_stride + rows
    _put(at_ptr, 0, field_stride, most, row_ok)
    _put(at_ptr, 1, field_stride, total, row_ok)
    if FULL:
        _single(at_ptr, 2, field_stride, row_ok, z, most, x, e, local, BLOCK_V)
        if ROUND:
            written = row_ok[:, None] & (cols < columns_if(flags & KEEP, w))[None, :]
            _keep(keep_ptr, keep_stride, rows, cols, raw, written)
            zw = logits(round_to(raw, work, ROUND), bias, factor, top, inside)
            most, total, x, e = normaliser(zw)
            _put(at_ptr, 7, field_stride, most, row_ok)
            _put(at_ptr, 8, field_stride, total, row_ok)
    column = (y - v0).to(tl.int32)
    hit = (y >= v0) & (column // BLOCK_V == chunk) & (column < w)
    _at_target(z_ptr, z_stride, bias_ptr, w, flags & BIAS, at_target_ptr, rows, column, hit,
               factor, top)  # fmt: skip


@triton.jit(do_not_specialize=["flags", "m", "v0"])
def fold_two(
    z_ptr, zr_ptr, za_ptr, adv_ptr, keep_ptr, ref_keep_ptr, bias_ptr, ref_bias_ptr,
    targets_ptr, params_ptr, fields_ptr, at_target_ptr,
    flags, m, w, v0, z_stride: tl.int64, zr_stride: tl.int64, za_stride: tl.int64,
    adv_stride: tl.int64, keep_stride: tl.int64, field_stride: tl.int64, chunk_stride: tl.int64,
    target_stride: tl.int64,
    FULL: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fields of two models read together; A from adv (stride 0: one row for all) or a third."""
    dtype: tl.constexpr = fields_ptr.dtype.element_ty
    work: tl.constexpr = keep_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    local = tl.arange(0, BLOCK_V)
    cols = chunk * BLOCK_V + local
    row_ok, col_ok = rows < m, cols < w
    y = tl.load(targets_ptr + rows, mask=row_ok, other=-1)
    inside = (y >= 0)[:, None] & col_ok[None, :]
    factor, top = tl.load(params_ptr), tl.load(params_ptr + 1)
    ref_factor, ref_top = tl.load(params_ptr + 2), tl.load(params_ptr + 3)
    bias = load_bias(bias_ptr, cols, col_ok, w, flags & BIAS)
    ref_bias = load_bias(ref_bias_ptr, cols, col_ok, w, flags & REF_BIAS)
    raw = load_products(z_ptr, z_stride, rows, cols, inside, dtype)
    raw_r = load_products(zr_ptr, zr_stride, rows, cols, inside, dtype)
    z = logits(raw, bias, factor, top, inside)
    zr = logits(raw_r, ref_bias, ref_factor, ref_top, inside)
    most, total, x, e = normaliser(z)
    most_r, total_r, xr, er = normaliser(zr)
    at_ptr = fields_ptr + chunk * chunk_stride + rows
    _put(at_ptr, 0, field_stride, most, row_ok)
    _put(at_ptr, 1, field_stride, total, row_ok)
    _put(at_ptr, 2, field_stride, most_r, row_ok)
    _put(at_ptr, 3, field_stride, total_r, row_ok)
    d = xr - x
    _put(at_ptr, 4, field_stride, tl.sum(weighted(er, d), axis=1), row_ok)
    _put(at_ptr, 5, field_stride, tl.sum(weighted(e, -d), axis=1), row_ok)
    zw, zwr = z, zr
    if ROUND:
        written = row_ok[:, None] & (cols < columns_if(flags & KEEP, w))[None, :]
        _keep(keep_ptr, keep_stride, rows, cols, raw, written)
        _keep(ref_keep_ptr, keep_stride, rows, cols, raw_r, written)
        zw = logits(round_to(raw, work, ROUND), bias, factor, top, inside)
        zwr = logits(round_to(raw_r, work, ROUND), ref_bias, ref_factor, ref_top, inside)
        most_w, total_w, _, _ = normaliser(zw)
        _put(at_ptr, 6, field_stride, most_w, row_ok)
        _put(at_ptr, 7, field_stride, total_w, row_ok)
        most_w, total_w, _, _ = normaliser(zwr)
        _put(at_ptr, 8, field_stride, most_w, row_ok)
        _put(at_ptr, 9, field_stride, total_w, row_ok)
    if FULL:
        _single(at_ptr, 10, field_stride, row_ok, z, most, x, e, local, BLOCK_V)
        for i in tl.static_range(3):  # alpha, renyi, mix
            u, s, _, _ = normaliser(blend(x, xr, tl.load(params_ptr + 5 + i)))
            _put(at_ptr, 15 + 2 * i, field_stride, u, row_ok)
            _put(at_ptr, 16 + 2 * i, field_stride, s, row_ok)
        u, s, _, _ = normaliser(blend(zw, zwr, tl.load(params_ptr + 7)))
        _put(at_ptr, 21, field_stride, u, row_ok)
        _put(at_ptr, 22, field_stride, s, row_ok)
        if (flags & VALUES) != 0:
            adv = load_products(adv_ptr, adv_stride, rows, cols, inside, dtype)
            _put(at_ptr, 23, field_stride, tl.sum(weighted(e, adv), axis=1), row_ok)
        if (flags & THIRD) != 0:
            none = tl.zeros([BLOCK_V], dtype)  # the third head has no bias
            raw_a = load_products(za_ptr, za_stride, rows, cols, inside, dtype)
            za = logits(raw_a, none, ref_factor, ref_top, inside)
            most_a, total_a, xa, _ = normaliser(za)
            _put(at_ptr, 23, field_stride, tl.sum(weighted(e, xa - xr), axis=1), row_ok)
            _put(at_ptr, 24, field_stride, most_a, row_ok)
            _put(at_ptr, 25, field_stride, total_a, row_ok)
            if ROUND:
                zwa = logits(round_to(raw_a, work, ROUND), none, ref_factor, ref_top, inside)
                most_w, total_w, _, _ = normaliser(zwa)
                _put(at_ptr, 26, field_stride, most_w, row_ok)
                _put(at_ptr, 27, field_stride, total_w, row_ok)
    column = (y - v0).to(tl.int32)
    hit = (y >= v0) & (column // BLOCK_V == chunk) & (column < w)
    _at_target(z_ptr, z_stride, bias_ptr, w, flags & BIAS, at_target_ptr, rows, column, hit,
               factor, top)  # fmt: skip
    _at_target(zr_ptr, zr_stride, ref_bias_ptr, w, flags & REF_BIAS,
               at_target_ptr + target_stride, rows, column, hit, ref_factor, ref_top)  # fmt: skip


@triton.jit(do_not_specialize=["flags", "m", "v0"])
def fold_second(
    z_ptr, zr_ptr, work_ptr, bias_ptr, ref_bias_ptr, targets_ptr, params_ptr, norms_ptr,
    fields_ptr,
    flags, m, w, v0, z_stride: tl.int64, zr_stride: tl.int64, norm_stride: tl.int64,
    field_stride: tl.int64, chunk_stride: tl.int64,
    ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sums of jsd, tv and bkl, from logits and both normalisers; work_ptr lends its dtype."""
    dtype: tl.constexpr = fields_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok, col_ok = rows < m, cols < w
    y = tl.load(targets_ptr + rows, mask=row_ok, other=-1)
    inside = (y >= 0)[:, None] & col_ok[None, :]
    bias = load_bias(bias_ptr, cols, col_ok, w, flags & BIAS)
    ref_bias = load_bias(ref_bias_ptr, cols, col_ok, w, flags & REF_BIAS)
    ref_factor, ref_top = tl.load(params_ptr + 2), tl.load(params_ptr + 3)
    raw = load_products(z_ptr, z_stride, rows, cols, inside, dtype)
    raw_r = load_products(zr_ptr, zr_stride, rows, cols, inside, dtype)
    z = logits(raw, bias, tl.load(params_ptr), tl.load(params_ptr + 1), inside)
    zr = logits(raw_r, ref_bias, ref_factor, ref_top, inside)
    lp = z - load_row(norms_ptr, 0, norm_stride, rows, row_ok)
    lp = lp - load_row(norms_ptr, 1, norm_stride, rows, row_ok)
    lr = zr - load_row(norms_ptr, 2, norm_stride, rows, row_ok)
    lr = lr - load_row(norms_ptr, 3, norm_stride, rows, row_ok)
    p = tl.where(inside, tl.exp(lp), 0.0)
    r = tl.where(inside, tl.exp(lr), 0.0)
    at_ptr = fields_ptr + chunk * chunk_stride + rows
    # beyond |d| = 80 one model is e^-80 of the other; the clamp keeps e^d finite
    d = tl.minimum(tl.maximum(lr - lp, -80.0), 80.0)
    ratio = log1p(tl.load(params_ptr + 8) * (tl.exp(d) - 1.0))
    _put(at_ptr, 0, field_stride, tl.sum(weighted(r, d - ratio), axis=1), row_ok)
    _put(at_ptr, 1, field_stride, tl.sum(weighted(p, -ratio), axis=1), row_ok)
    gap = p - r
    _put(at_ptr, 2, field_stride, tl.sum(tl.abs(gap), axis=1), row_ok)
    sign = tl.where(gap > 0, p, tl.where(gap < 0, -p, 0.0))
    _put(at_ptr, 3, field_stride, tl.sum(sign, axis=1), row_ok)
    seen = zr
    if ROUND:
        seen = round_to(raw_r, work_ptr.dtype.element_ty, ROUND)
        seen = logits(seen, ref_bias, ref_factor, ref_top, inside)
    top = in_top(seen, v0 + cols, load_row(norms_ptr, 4, norm_stride, rows, row_ok),
                 load_row(norms_ptr, 5, norm_stride, rows, row_ok))  # fmt: skip
    inner = tl.where(top, r, 0.0)
    _put(at_ptr, 4, field_stride, tl.sum(weighted(inner, lr - lp), axis=1), row_ok)
    _put(at_ptr, 5, field_stride, tl.sum(tl.where(top, 0.0, r), axis=1), row_ok)
    _put(at_ptr, 6, field_stride, tl.sum(tl.where(top, 0.0, p), axis=1), row_ok)


@triton.jit(do_not_specialize=["flags", "m"])
def seen_logits(
    z_ptr, work_ptr, bias_ptr, params_ptr, out_ptr, flags, m, w,
    z_stride: tl.int64, out_stride: tl.int64,
    ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The reference's logits as the backward reads them."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (rows < m)[:, None] & (cols < w)[None, :]
    bias = load_bias(bias_ptr, cols, cols < w, w, flags & REF_BIAS)
    raw = load_products(z_ptr, z_stride, rows, cols, inside, dtype)
    raw = round_to(raw, work_ptr.dtype.element_ty, ROUND)
    z = logits(raw, bias, tl.load(params_ptr + 2), tl.load(params_ptr + 3), inside)
    at = rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
    tl.store(out_ptr + at, z, mask=inside)
