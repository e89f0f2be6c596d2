"""Forward kernels: each reads a tile once and writes the sums of every (row, chunk) of it.

One program holds BLOCK_M rows and BLOCK_V columns, which are one chunk; fields and scalars are
listed in prefkern/backends/tables.py and tiled/epilogue.py. Lanes beyond the tile or in rows that
do not count are -inf before any exp, so no masked lane can turn into NaN. Offsets of rows are
64-bit: rows times columns can pass 2^31. Pointers that a call has no use for point anywhere;
`flags` says which are read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .loads import (
    before_cap,
    capped,
    columns_if,
    in_top,
    load_products,
    load_row,
    load_targets,
    load_values,
    logits,
    only,
    round_to,
    target_column,
)
from .positions import FIELD, FLAG, NORM, PARAM, SUM
from .primitives import (
    blend,
    exp,
    expm1,
    log1p,
    max_2,
    narrow,
    normaliser,
    relative,
    sum_2,
    sum_4,
    weighted,
    widen,
)


@triton.jit
def _put(at_ptr, index: tl.constexpr, field_stride, value, mask):
    tl.store(at_ptr + index * field_stride, value, mask=mask)


@triton.jit
def _rounded(at_ptr, field_stride, row_ok, keep_ptr, keep_stride, rows, cols, raw, bias_ptr,
             col_ok, biased, factor, top, inside, written):  # fmt: skip
    """The products as a backward reads them, where they are `written` (kept), and their
    normaliser."""
    work: tl.constexpr = keep_ptr.dtype.element_ty
    at = rows.to(tl.int64)[:, None] * keep_stride + cols[None, :]
    tl.store(keep_ptr + at, narrow(raw, work), mask=row_ok[:, None] & written[None, :])
    z = logits(round_to(raw, work, True), bias_ptr, cols, col_ok, biased, factor, top, inside)
    most, total, _, _ = normaliser(z)
    _put(at_ptr, FIELD.round_max, field_stride, most, row_ok)
    _put(at_ptr, FIELD.round_sum, field_stride, total, row_ok)


@triton.jit
def _single(at_ptr, field_stride, mask, z, most, x, e, cols, BLOCK_V: tl.constexpr):
    """What one model's statistics beside the normaliser are made of."""
    finite = z > float("-inf")
    sum_x, sq, z_sum, z_count = sum_4(
        weighted(e, x), e * e, tl.where(finite, z, 0.0), tl.where(finite, 1.0, 0.0).to(z.dtype)
    )
    _put(at_ptr, FIELD.x, field_stride, sum_x, mask)
    _put(at_ptr, FIELD.sq, field_stride, sq, mask)
    _put(at_ptr, FIELD.z_sum, field_stride, z_sum, mask)
    _put(at_ptr, FIELD.z_count, field_stride, z_count, mask)
    largest = tl.where(z == most[:, None], cols[None, :], BLOCK_V)
    _put(at_ptr, FIELD.top, field_stride, tl.min(largest, axis=1), mask)


@triton.jit
def _values(at_ptr, field_stride, mask, adv_ptr, adv_stride, rows, cols, inside, e):
    """sum e A of given values (stride 0: one row for all)."""
    adv = load_values(adv_ptr, adv_stride, rows, cols, inside, e.dtype)
    _put(at_ptr, FIELD.adv, field_stride, tl.sum(weighted(e, adv), axis=1), mask)


@triton.jit
def _blend(at_ptr, most: tl.constexpr, total: tl.constexpr, field_stride, mask, x, xr, a):
    u, s, _, _ = normaliser(blend(x, xr, a))
    _put(at_ptr, most, field_stride, u, mask)
    _put(at_ptr, total, field_stride, s, mask)


@triton.jit
def _at_target(x_ptr, stride, bias_ptr, present, out_ptr, rows, column, factor, top,
               dtype: tl.constexpr):  # fmt: skip
    """The logit of the target, for the rows whose target has a column in this chunk."""
    hit = column >= 0
    at = rows.to(tl.int64) * stride + column
    x = widen(tl.load(x_ptr + at, mask=hit, other=0.0), dtype)
    z = capped(before_cap(x, bias_ptr, column, hit, present, factor), top)
    tl.store(out_ptr + rows, z.to(out_ptr.dtype.element_ty), mask=hit)


@triton.jit
def _own_column(y, v0, chunk, w, live, BLOCK_V: tl.constexpr):
    """The target's column of the tile where it is in this chunk, else negative."""
    first = chunk * BLOCK_V
    own = target_column(y, v0 + first, tl.minimum(w - first, BLOCK_V), live)
    return tl.where(own >= 0, own + first, -1)


@triton.jit(do_not_specialize=["flags", "m", "v0", "ignore"])
def fold_one(
    x_ptr, adv_ptr, keep_ptr, bias_ptr, targets_ptr, params_ptr, fields_ptr, at_ptr,
    flags, m, w, v0, ignore: tl.int64, x_stride: tl.int64, adv_stride: tl.int64,
    keep_stride: tl.int64, field_stride: tl.int64, chunk_stride: tl.int64,
    FULL: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fields of one model."""
    dtype: tl.constexpr = fields_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    local = tl.arange(0, BLOCK_V)
    cols = chunk * BLOCK_V + local
    row_ok, col_ok = rows < m, cols < w
    y, live = load_targets(targets_ptr, rows, row_ok, ignore)
    inside = live[:, None] & col_ok[None, :]
    factor, top = tl.load(params_ptr + PARAM.factor), tl.load(params_ptr + PARAM.top)
    raw = load_products(x_ptr, x_stride, rows, cols, inside, dtype)
    z = logits(raw, bias_ptr, cols, col_ok, flags & FLAG.bias, factor, top, inside)
    most, total, x, e = normaliser(z)
    put_ptr = fields_ptr + chunk * chunk_stride + rows
    _put(put_ptr, FIELD.max, field_stride, most, row_ok)
    _put(put_ptr, FIELD.sum, field_stride, total, row_ok)
    if FULL:
        _single(put_ptr, field_stride, row_ok, z, most, x, e, local, BLOCK_V)
        if (flags & FLAG.values) != 0:
            _values(put_ptr, field_stride, row_ok, adv_ptr, adv_stride, rows, cols, inside, e)
    if ROUND:
        written = cols < columns_if(flags & FLAG.keep, w)
        _rounded(put_ptr, field_stride, row_ok, keep_ptr, keep_stride, rows, cols, raw, bias_ptr,
                 col_ok, flags & FLAG.bias, factor, top, inside, written)  # fmt: skip
    column = _own_column(y, v0, chunk, w, live, BLOCK_V)
    _at_target(x_ptr, x_stride, bias_ptr, flags & FLAG.bias, at_ptr, rows, column, factor, top,
               dtype)  # fmt: skip


@triton.jit(do_not_specialize=["flags", "m", "v0", "ignore"])
def fold_two(
    x_ptr, xr_ptr, xa_ptr, adv_ptr, keep_ptr, bias_ptr, ref_bias_ptr, aux_bias_ptr,
    targets_ptr, params_ptr, fields_ptr, at_ptr,
    flags, m, w, v0, ignore: tl.int64, x_stride: tl.int64, xr_stride: tl.int64,
    xa_stride: tl.int64, adv_stride: tl.int64, keep_stride: tl.int64, field_stride: tl.int64,
    chunk_stride: tl.int64, at_stride: tl.int64,
    FULL: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fields of two models read together; A from adv or a third head."""
    dtype: tl.constexpr = fields_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    local = tl.arange(0, BLOCK_V)
    cols = chunk * BLOCK_V + local
    row_ok, col_ok = rows < m, cols < w
    y, live = load_targets(targets_ptr, rows, row_ok, ignore)
    inside = live[:, None] & col_ok[None, :]
    factor, top = tl.load(params_ptr + PARAM.factor), tl.load(params_ptr + PARAM.top)
    ref_factor = tl.load(params_ptr + PARAM.ref_factor)
    ref_top = tl.load(params_ptr + PARAM.ref_top)
    raw = load_products(x_ptr, x_stride, rows, cols, inside, dtype)
    raw_r = load_products(xr_ptr, xr_stride, rows, cols, inside, dtype)
    z = logits(raw, bias_ptr, cols, col_ok, flags & FLAG.bias, factor, top, inside)
    zr = logits(raw_r, ref_bias_ptr, cols, col_ok, flags & FLAG.ref_bias, ref_factor, ref_top,
                inside)  # fmt: skip
    most, most_r = max_2(z, zr)
    x, e = relative(z, most)
    xr, er = relative(zr, most_r)
    d = xr - x
    total, total_r, ref_cross, pol_cross = sum_4(e, er, weighted(er, d), weighted(e, -d))
    put_ptr = fields_ptr + chunk * chunk_stride + rows
    _put(put_ptr, FIELD.max, field_stride, most, row_ok)
    _put(put_ptr, FIELD.sum, field_stride, total, row_ok)
    _put(put_ptr, FIELD.ref_max, field_stride, most_r, row_ok)
    _put(put_ptr, FIELD.ref_sum, field_stride, total_r, row_ok)
    _put(put_ptr, FIELD.ref_cross, field_stride, ref_cross, row_ok)
    _put(put_ptr, FIELD.pol_cross, field_stride, pol_cross, row_ok)
    if ROUND:
        written = cols < columns_if(flags & FLAG.keep, w)
        _rounded(put_ptr, field_stride, row_ok, keep_ptr, keep_stride, rows, cols, raw, bias_ptr,
                 col_ok, flags & FLAG.bias, factor, top, inside, written)  # fmt: skip
    if FULL:
        _single(put_ptr, field_stride, row_ok, z, most, x, e, local, BLOCK_V)
        if (flags & FLAG.alpha) != 0:
            _blend(put_ptr, FIELD.alpha_max, FIELD.alpha_sum, field_stride, row_ok, x, xr,
                   tl.load(params_ptr + PARAM.alpha))  # fmt: skip
        if (flags & FLAG.renyi) != 0:
            _blend(put_ptr, FIELD.renyi_max, FIELD.renyi_sum, field_stride, row_ok, x, xr,
                   tl.load(params_ptr + PARAM.renyi))  # fmt: skip
        if (flags & FLAG.mix) != 0:
            _blend(put_ptr, FIELD.mix_max, FIELD.mix_sum, field_stride, row_ok, x, xr,
                   tl.load(params_ptr + PARAM.mix))  # fmt: skip
        if (flags & FLAG.values) != 0:
            _values(put_ptr, field_stride, row_ok, adv_ptr, adv_stride, rows, cols, inside, e)
        if (flags & FLAG.third) != 0:
            raw_a = load_products(xa_ptr, xa_stride, rows, cols, inside, dtype)
            za = logits(raw_a, aux_bias_ptr, cols, col_ok, flags & FLAG.aux_bias,
                        tl.load(params_ptr + PARAM.aux_factor),
                        tl.load(params_ptr + PARAM.aux_top), inside)  # fmt: skip
            most_a, total_a, xa, _ = normaliser(za)
            _put(put_ptr, FIELD.adv, field_stride, tl.sum(weighted(e, xa - xr), axis=1), row_ok)
            _put(put_ptr, FIELD.aux_max, field_stride, most_a, row_ok)
            _put(put_ptr, FIELD.aux_sum, field_stride, total_a, row_ok)
    column = _own_column(y, v0, chunk, w, live, BLOCK_V)
    _at_target(x_ptr, x_stride, bias_ptr, flags & FLAG.bias, at_ptr, rows, column, factor, top,
               dtype)  # fmt: skip
    _at_target(xr_ptr, xr_stride, ref_bias_ptr, flags & FLAG.ref_bias, at_ptr + at_stride, rows,
               column, ref_factor, ref_top, dtype)  # fmt: skip


@triton.jit(do_not_specialize=["flags", "m", "v0", "ignore"])
def fold_second(
    x_ptr, xr_ptr, bias_ptr, ref_bias_ptr, targets_ptr, params_ptr, norms_ptr, fields_ptr,
    flags, m, w, v0, ignore: tl.int64, x_stride: tl.int64, xr_stride: tl.int64,
    norm_stride: tl.int64, field_stride: tl.int64, chunk_stride: tl.int64,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sums of jsd, tv and bkl, from logits and both normalisers."""
    dtype: tl.constexpr = fields_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok, col_ok = rows < m, cols < w
    _, live = load_targets(targets_ptr, rows, row_ok, ignore)
    inside = live[:, None] & col_ok[None, :]
    raw = load_products(x_ptr, x_stride, rows, cols, inside, dtype)
    raw_r = load_products(xr_ptr, xr_stride, rows, cols, inside, dtype)
    z = logits(raw, bias_ptr, cols, col_ok, flags & FLAG.bias,
               tl.load(params_ptr + PARAM.factor), tl.load(params_ptr + PARAM.top),
               inside)  # fmt: skip
    ref_factor = tl.load(params_ptr + PARAM.ref_factor)
    ur = before_cap(raw_r, ref_bias_ptr, cols[None, :], col_ok[None, :], flags & FLAG.ref_bias,
                    ref_factor)  # fmt: skip
    ref_top = tl.load(params_ptr + PARAM.ref_top)
    zr = only(inside, capped(ur, ref_top), ref_factor, ref_top)
    lp = z - load_row(norms_ptr, NORM.lse, norm_stride, rows, row_ok)
    lp = lp - load_row(norms_ptr, NORM.lse_low, norm_stride, rows, row_ok)
    lr = zr - load_row(norms_ptr, NORM.ref_lse, norm_stride, rows, row_ok)
    lr = lr - load_row(norms_ptr, NORM.ref_lse_low, norm_stride, rows, row_ok)
    p = tl.where(inside, exp(lp), 0.0)
    r = tl.where(inside, exp(lr), 0.0)
    put_ptr = fields_ptr + chunk * chunk_stride + rows
    if (flags & FLAG.jsd) != 0:
        # beyond |d| = 80 one model is e^-80 of the other; the clamp keeps e^d finite
        d = tl.minimum(tl.maximum(lr - lp, -80.0), 80.0)
        ratio = log1p(tl.load(params_ptr + PARAM.jsd) * expm1(d))
        kl_ref, kl_pol = sum_2(weighted(r, d - ratio), weighted(p, -ratio))
        _put(put_ptr, SUM.kl_ref, field_stride, kl_ref, row_ok)
        _put(put_ptr, SUM.kl_pol, field_stride, kl_pol, row_ok)
    if (flags & FLAG.tv) != 0:
        gap = p - r
        sign = tl.where(gap > 0, p, tl.where(gap < 0, -p, 0.0))
        tv, tv_mean = sum_2(tl.abs(gap), sign)
        _put(put_ptr, SUM.tv, field_stride, tv, row_ok)
        _put(put_ptr, SUM.tv_mean, field_stride, tv_mean, row_ok)
    if (flags & FLAG.bkl) != 0:
        top = in_top(ur, v0 + cols, load_row(norms_ptr, NORM.top_value, norm_stride, rows, row_ok),
                     load_row(norms_ptr, NORM.top_index, norm_stride, rows, row_ok))  # fmt: skip
        inner = tl.where(top, r, 0.0)
        _put(put_ptr, SUM.top_kl, field_stride, tl.sum(weighted(inner, lr - lp), axis=1), row_ok)
        _put(put_ptr, SUM.rest_ref, field_stride, tl.sum(tl.where(top, 0.0, r), axis=1), row_ok)
        _put(put_ptr, SUM.rest_pol, field_stride, tl.sum(tl.where(top, 0.0, p), axis=1), row_ok)
