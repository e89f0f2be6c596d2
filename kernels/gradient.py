"""Backward kernels: one read of each tile, one write of dL/dx; and the terms of a frozen head.

Every statistic's part is a difference that vanishes where its gradient does, so that a small
gradient is not what is left of large terms (the formula stands beside COEFFICIENTS in
prefkern/backends/tiled/epilogue.py). dx may lie over the policy's own tile: each entry is read
before it is written, by the same program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fold import (
    BIAS,
    REF_BIAS,
    THIRD,
    VALUES,
    in_top,
    load_bias,
    load_products,
    load_row,
    logits,
    round_to,
)
from .primitives import blend, log1p, narrow, shape, weighted


@triton.jit
def _finish(d, z, slope, y, v0, cols, e, inside):
    """Adds the target's part and the slope of the cap; 0 in lanes that do not count."""
    d = d + tl.where((y - v0)[:, None] == cols[None, :], e, 0.0)
    if slope != 0:
        u = z * slope
        d = weighted(d, 1.0 - u * u)
    return tl.where(inside, d, 0.0)


@triton.jit(do_not_specialize=["flags", "m", "v0"])
def gradient_one(
    z_ptr, dx_ptr, bias_ptr, targets_ptr, params_ptr, coef_ptr,
    flags, m, w, v0, z_stride: tl.int64, dx_stride: tl.int64, coef_stride: tl.int64,
    FULL: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """p (a0 [+ ent (lp + H) + col (p - C)]) + e 1[v = y]"""
    dtype: tl.constexpr = coef_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok, col_ok = rows < m, cols < w
    y = tl.load(targets_ptr + rows, mask=row_ok, other=-1)
    inside = (y >= 0)[:, None] & col_ok[None, :]
    bias = load_bias(bias_ptr, cols, col_ok, w, flags & BIAS)
    raw = load_products(z_ptr, z_stride, rows, cols, inside, dtype)
    raw = round_to(raw, dx_ptr.dtype.element_ty, ROUND)
    z = logits(raw, bias, tl.load(params_ptr), tl.load(params_ptr + 1), inside)
    lp = z - load_row(coef_ptr, 0, coef_stride, rows, row_ok)
    lp = lp - load_row(coef_ptr, 1, coef_stride, rows, row_ok)
    p = tl.exp(lp)
    inner = load_row(coef_ptr, 3, coef_stride, rows, row_ok)
    if FULL:
        ent = load_row(coef_ptr, 4, coef_stride, rows, row_ok)
        inner = inner + ent * (lp + load_row(coef_ptr, 5, coef_stride, rows, row_ok))
        col = load_row(coef_ptr, 6, coef_stride, rows, row_ok)
        inner = inner + col * (p - load_row(coef_ptr, 7, coef_stride, rows, row_ok))
    d = _finish(weighted(p, inner), z, tl.load(params_ptr + 4), y, v0, cols,
                load_row(coef_ptr, 2, coef_stride, rows, row_ok), inside)  # fmt: skip
    at = rows.to(tl.int64)[:, None] * dx_stride + cols[None, :]
    tl.store(dx_ptr + at, narrow(d, dx_ptr.dtype.element_ty),
             mask=row_ok[:, None] & col_ok[None, :])  # fmt: skip


@triton.jit
def _term(c, value):
    """c * value, 0 where c is 0 even if the value is not finite."""
    return tl.where(c == 0, 0.0, c * value)


@triton.jit(do_not_specialize=["flags", "m", "v0"])
def gradient_two(
    z_ptr, zr_ptr, za_ptr, adv_ptr, dx_ptr, bias_ptr, ref_bias_ptr, targets_ptr, params_ptr,
    coef_ptr,
    flags, m, w, v0, z_stride: tl.int64, zr_stride: tl.int64, za_stride: tl.int64,
    adv_stride: tl.int64, dx_stride: tl.int64, coef_stride: tl.int64,
    FULL: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Small: a0, fkl and rkl; FULL: every statistic."""
    dtype: tl.constexpr = coef_ptr.dtype.element_ty
    work: tl.constexpr = dx_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok, col_ok = rows < m, cols < w
    y = tl.load(targets_ptr + rows, mask=row_ok, other=-1)
    inside = (y >= 0)[:, None] & col_ok[None, :]
    ref_factor, ref_top = tl.load(params_ptr + 2), tl.load(params_ptr + 3)
    bias = load_bias(bias_ptr, cols, col_ok, w, flags & BIAS)
    ref_bias = load_bias(ref_bias_ptr, cols, col_ok, w, flags & REF_BIAS)
    raw = load_products(z_ptr, z_stride, rows, cols, inside, dtype)
    raw_r = load_products(zr_ptr, zr_stride, rows, cols, inside, dtype)
    z = logits(round_to(raw, work, ROUND), bias, tl.load(params_ptr), tl.load(params_ptr + 1),
               inside)  # fmt: skip
    zr = logits(round_to(raw_r, work, ROUND), ref_bias, ref_factor, ref_top, inside)
    lp = z - load_row(coef_ptr, 0, coef_stride, rows, row_ok)
    lp = lp - load_row(coef_ptr, 1, coef_stride, rows, row_ok)
    lr = zr - load_row(coef_ptr, 8, coef_stride, rows, row_ok)
    lr = lr - load_row(coef_ptr, 9, coef_stride, rows, row_ok)
    p, r = tl.exp(lp), tl.exp(lr)
    inner = load_row(coef_ptr, 3, coef_stride, rows, row_ok)
    rkl = load_row(coef_ptr, 11, coef_stride, rows, row_ok)
    inner = inner + _term(rkl, lp - lr - load_row(coef_ptr, 12, coef_stride, rows, row_ok))
    if FULL:
        ent = load_row(coef_ptr, 4, coef_stride, rows, row_ok)
        inner = inner + _term(ent, lp + load_row(coef_ptr, 5, coef_stride, rows, row_ok))
        col = load_row(coef_ptr, 6, coef_stride, rows, row_ok)
        inner = inner + col * (p - load_row(coef_ptr, 7, coef_stride, rows, row_ok))
        ev = load_row(coef_ptr, 13, coef_stride, rows, row_ok)
        mean = load_row(coef_ptr, 14, coef_stride, rows, row_ok)
        if (flags & VALUES) != 0:
            adv = load_products(adv_ptr, adv_stride, rows, cols, inside, dtype)
            inner = inner + _term(ev, adv - mean)
        if (flags & THIRD) != 0:
            raw_a = load_products(za_ptr, za_stride, rows, cols, inside, dtype)
            za = shape(round_to(raw_a, work, ROUND), ref_factor, ref_top)
            la = za - load_row(coef_ptr, 15, coef_stride, rows, row_ok)
            inner = inner + _term(ev, la - lr - mean)
        tv = load_row(coef_ptr, 24, coef_stride, rows, row_ok)
        sign = tl.where(p > r, 1.0, tl.where(p < r, -1.0, 0.0))
        inner = inner + tv * (sign - load_row(coef_ptr, 25, coef_stride, rows, row_ok))
        jsd = load_row(coef_ptr, 22, coef_stride, rows, row_ok)
        gap = tl.minimum(tl.maximum(lr - lp, -80.0), 80.0)
        ratio = log1p(tl.load(params_ptr + 8) * (tl.exp(gap) - 1.0))
        inner = inner - _term(jsd, ratio + load_row(coef_ptr, 23, coef_stride, rows, row_ok))
    d = weighted(p, inner) + load_row(coef_ptr, 10, coef_stride, rows, row_ok) * (p - r)
    if FULL:
        alpha = load_row(coef_ptr, 16, coef_stride, rows, row_ok)
        d = d + _term(alpha, tl.exp(blend(lp, lr, tl.load(params_ptr + 5))) - p)
        renyi = load_row(coef_ptr, 17, coef_stride, rows, row_ok)
        shift = load_row(coef_ptr, 18, coef_stride, rows, row_ok)
        d = d + _term(renyi, tl.exp(blend(lp, lr, tl.load(params_ptr + 6)) - shift) - p)
        mix = load_row(coef_ptr, 19, coef_stride, rows, row_ok)
        u = blend(z, zr, tl.load(params_ptr + 7))
        u = u - load_row(coef_ptr, 20, coef_stride, rows, row_ok)
        u = u - load_row(coef_ptr, 21, coef_stride, rows, row_ok)
        d = d + _term(mix, tl.exp(u) - p)
        bkl = load_row(coef_ptr, 26, coef_stride, rows, row_ok)
        top = in_top(zr, v0 + cols, load_row(coef_ptr, 28, coef_stride, rows, row_ok),
                     load_row(coef_ptr, 29, coef_stride, rows, row_ok))  # fmt: skip
        rest = p * load_row(coef_ptr, 27, coef_stride, rows, row_ok)
        d = d + _term(bkl, p - tl.where(top, r, rest))
    d = _finish(d, z, tl.load(params_ptr + 4), y, v0, cols,
                load_row(coef_ptr, 2, coef_stride, rows, row_ok), inside)  # fmt: skip
    at = rows.to(tl.int64)[:, None] * dx_stride + cols[None, :]
    tl.store(dx_ptr + at, narrow(d, work), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit(do_not_specialize=["flags", "which", "m"])
def factor(
    z_ptr, zr_ptr, out_ptr, bias_ptr, ref_bias_ptr, targets_ptr, params_ptr, maxima_ptr,
    flags, which, m, w, z_stride: tl.int64, zr_stride: tl.int64, out_stride: tl.int64,
    max_stride: tl.int64,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What multiplies the head's rows in one sum of a frozen head: which = 0 mass e, 1 log e x,
    2 ref er, 3 cross e (x - xr), each times the slope of the cap."""
    dtype: tl.constexpr = maxima_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok, col_ok = rows < m, cols < w
    y = tl.load(targets_ptr + rows, mask=row_ok, other=-1)
    inside = (y >= 0)[:, None] & col_ok[None, :]
    bias = load_bias(bias_ptr, cols, col_ok, w, flags & BIAS)
    raw = load_products(z_ptr, z_stride, rows, cols, inside, dtype)
    z = logits(raw, bias, tl.load(params_ptr), tl.load(params_ptr + 1), inside)
    x = z - load_row(maxima_ptr, 0, max_stride, rows, row_ok)
    f = tl.exp(x)
    if which == 1:
        f = weighted(f, x)
    if which >= 2:
        ref_bias = load_bias(ref_bias_ptr, cols, col_ok, w, flags & REF_BIAS)
        raw_r = load_products(zr_ptr, zr_stride, rows, cols, inside, dtype)
        zr = logits(raw_r, ref_bias, tl.load(params_ptr + 2), tl.load(params_ptr + 3), inside)
        xr = zr - load_row(maxima_ptr, 1, max_stride, rows, row_ok)
        f = tl.exp(xr) if which == 2 else weighted(f, x - xr)
    slope = tl.load(params_ptr + 4)
    if slope != 0:
        u = z * slope
        f = weighted(f, 1.0 - u * u)
    f = tl.where(inside, f, 0.0)
    at = rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
    tl.store(out_ptr + at, narrow(f, out_ptr.dtype.element_ty),
             mask=row_ok[:, None] & col_ok[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["mask", "m"])
def raise_rows(
    total_ptr, shift_ptr, mask, m, depth, kind_stride: tl.int64, row_stride: tl.int64,
    shift_stride: tl.int64,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Moves the sums of a frozen head to larger maxima; bit i of `mask`: sum i of FACTORS is there,
    in this order. Rows that do not move are neither read nor written."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = rows < m
    fp, fr = (
        tl.load(shift_ptr + rows, mask=ok, other=1.0),
        tl.load(shift_ptr + shift_stride + rows, mask=ok, other=1.0),
    )
    dp = tl.load(shift_ptr + 2 * shift_stride + rows, mask=ok, other=0.0)
    dr = tl.load(shift_ptr + 3 * shift_stride + rows, mask=ok, other=0.0)
    moved = (fp != 1) | (fr != 1) | (dp != 0) | (dr != 0)
    on = moved[:, None] & (cols < depth)[None, :]
    at_ptr = total_ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    mass = tl.load(at_ptr, mask=on, other=0.0)
    tl.store(at_ptr, fp[:, None] * mass, mask=on)
    for i in tl.static_range(1, 4):
        if (mask & (1 << i)) != 0:
            at_ptr += kind_stride
            total = tl.load(at_ptr, mask=on, other=0.0)
            if i == 1:
                total = fp[:, None] * (total + dp[:, None] * mass)
            elif i == 2:
                total = fr[:, None] * total
            else:
                total = fp[:, None] * (total + (dp - dr)[:, None] * mass)
            tl.store(at_ptr, total, mask=on)
