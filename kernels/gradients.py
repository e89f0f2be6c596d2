"""Backward kernels: one read of each tile, one write of dL/dx; and the terms of a frozen head.

Every statistic's part is a difference that vanishes where its gradient does, so that a small
gradient is not what is left of large terms (the formula stands beside COEFFICIENTS in
prefkern/backends/tables.py). dx may lie over the policy's own tile: each entry is read before it is
written, by the same program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .loads import (
    before_cap,
    capped,
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
from .positions import COEF, FACTOR, FLAG, MAXIMUM, PARAM, SHIFT
from .primitives import blend, exp, expm1, log1p, narrow, weighted


@triton.jit
def _finish(d, z, slope, y, first, width, live, e, BLOCK_V: tl.constexpr):
    """Adds the target's part, which few programs have, and the slope of the cap. Lanes that do not
    count have no probability, and rows that do not count no coefficients."""
    own = target_column(y, first, tl.minimum(width, BLOCK_V), live)
    if tl.max(own, axis=0) >= 0:
        d = d + tl.where(own[:, None] == tl.arange(0, BLOCK_V)[None, :], e, 0.0)
    if slope != 0:
        u = z * slope
        d = weighted(d, 1.0 - u * u)
    return d


@triton.jit
def _term(c, value):
    """c * value, 0 where c is 0 even if the value is not finite."""
    return tl.where(c == 0, 0.0, c * value)


@triton.jit
def _log_prob(z, coef_ptr, high: tl.constexpr, low: tl.constexpr, stride, rows, row_ok):
    """z - lse, whose two parts lose nothing of a large one."""
    lp = z - load_row(coef_ptr, high, stride, rows, row_ok)
    return lp - load_row(coef_ptr, low, stride, rows, row_ok)


@triton.jit
def _own(inner, lp, p, coef_ptr, stride, rows, row_ok):
    """Adds ent (lp + H) + col (p - C)."""
    ent = load_row(coef_ptr, COEF.ent, stride, rows, row_ok)
    inner += _term(ent, lp + load_row(coef_ptr, COEF.ent_value, stride, rows, row_ok))
    col = load_row(coef_ptr, COEF.col, stride, rows, row_ok)
    return inner + col * (p - load_row(coef_ptr, COEF.col_value, stride, rows, row_ok))


@triton.jit
def _store(dx_ptr, dx_stride, rows, cols, row_ok, col_ok, d):
    at = rows.to(tl.int64)[:, None] * dx_stride + cols[None, :]
    tl.store(dx_ptr + at, narrow(d, dx_ptr.dtype.element_ty),
             mask=row_ok[:, None] & col_ok[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["flags", "m", "v0", "ignore"])
def gradient_one(
    x_ptr, adv_ptr, dx_ptr, bias_ptr, targets_ptr, params_ptr, coef_ptr,
    flags, m, w, v0, ignore: tl.int64, x_stride: tl.int64, adv_stride: tl.int64,
    dx_stride: tl.int64, coef_stride: tl.int64,
    FULL: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """p (a0 [+ ent (lp + H) + col (p - C) + ev (A - ev_value)]) + e 1[v = y] [+ teach q]"""
    dtype: tl.constexpr = coef_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok, col_ok = rows < m, cols < w
    y, live = load_targets(targets_ptr, rows, row_ok, ignore)
    inside = live[:, None] & col_ok[None, :]
    raw = load_products(x_ptr, x_stride, rows, cols, inside, dtype)
    raw = round_to(raw, dx_ptr.dtype.element_ty, ROUND)
    z = logits(raw, bias_ptr, cols, col_ok, flags & FLAG.bias,
               tl.load(params_ptr + PARAM.factor), tl.load(params_ptr + PARAM.top),
               inside)  # fmt: skip
    lp = _log_prob(z, coef_ptr, COEF.lse, COEF.lse_low, coef_stride, rows, row_ok)
    p = exp(lp)
    inner = load_row(coef_ptr, COEF.a0, coef_stride, rows, row_ok)
    if FULL:
        inner = _own(inner, lp, p, coef_ptr, coef_stride, rows, row_ok)
        if (flags & FLAG.values) != 0:
            adv = load_values(adv_ptr, adv_stride, rows, cols, inside, dtype)
            mean = load_row(coef_ptr, COEF.ev_value, coef_stride, rows, row_ok)
            inner += _term(load_row(coef_ptr, COEF.ev, coef_stride, rows, row_ok), adv - mean)
    d = weighted(p, inner)
    if FULL:  # noqa: SIM102 (known when compiling; the flag is not)
        if (flags & FLAG.teacher) != 0:
            q = load_values(adv_ptr, adv_stride, rows, cols, inside, dtype)
            d += load_row(coef_ptr, COEF.teach, coef_stride, rows, row_ok) * q
    first = tl.program_id(1) * BLOCK_V
    d = _finish(d, z, tl.load(params_ptr + PARAM.slope), y, v0 + first, w - first, live,
                load_row(coef_ptr, COEF.e, coef_stride, rows, row_ok), BLOCK_V)  # fmt: skip
    _store(dx_ptr, dx_stride, rows, cols, row_ok, col_ok, d)


@triton.jit(do_not_specialize=["flags", "m", "v0", "ignore"])
def gradient_two(
    x_ptr, xr_ptr, xa_ptr, adv_ptr, dx_ptr, bias_ptr, ref_bias_ptr, aux_bias_ptr, targets_ptr,
    params_ptr, coef_ptr,
    flags, m, w, v0, ignore: tl.int64, x_stride: tl.int64, xr_stride: tl.int64,
    xa_stride: tl.int64, adv_stride: tl.int64, dx_stride: tl.int64, coef_stride: tl.int64,
    FULL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Small: a0, fkl and rkl; FULL: every statistic. Products as they are: a gradient that compares
    two models never reads rounded ones."""
    dtype: tl.constexpr = coef_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok, col_ok = rows < m, cols < w
    y, live = load_targets(targets_ptr, rows, row_ok, ignore)
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
    lp = _log_prob(z, coef_ptr, COEF.lse, COEF.lse_low, coef_stride, rows, row_ok)
    lr = _log_prob(zr, coef_ptr, COEF.ref_lse, COEF.ref_lse_low, coef_stride, rows, row_ok)
    p, r = exp(lp), exp(lr)
    inner = load_row(coef_ptr, COEF.a0, coef_stride, rows, row_ok)
    rkl = load_row(coef_ptr, COEF.rkl, coef_stride, rows, row_ok)
    mean = load_row(coef_ptr, COEF.rkl_value, coef_stride, rows, row_ok)
    inner += _term(rkl, lp - lr - mean)
    d = load_row(coef_ptr, COEF.fkl, coef_stride, rows, row_ok) * (p - r)
    if FULL:
        inner = _own(inner, lp, p, coef_ptr, coef_stride, rows, row_ok)
        ev = load_row(coef_ptr, COEF.ev, coef_stride, rows, row_ok)
        mean = load_row(coef_ptr, COEF.ev_value, coef_stride, rows, row_ok)
        if (flags & FLAG.values) != 0:
            adv = load_values(adv_ptr, adv_stride, rows, cols, inside, dtype)
            inner += _term(ev, adv - mean)
        if (flags & FLAG.teacher) != 0:
            q = load_values(adv_ptr, adv_stride, rows, cols, inside, dtype)
            d += load_row(coef_ptr, COEF.teach, coef_stride, rows, row_ok) * q
        if (flags & FLAG.third) != 0:
            raw_a = load_products(xa_ptr, xa_stride, rows, cols, inside, dtype)
            za = logits(raw_a, aux_bias_ptr, cols, col_ok, flags & FLAG.aux_bias,
                        tl.load(params_ptr + PARAM.aux_factor),
                        tl.load(params_ptr + PARAM.aux_top), inside)  # fmt: skip
            la = _log_prob(za, coef_ptr, COEF.aux_lse, COEF.aux_lse_low, coef_stride, rows, row_ok)
            inner += _term(ev, la - lr - mean)
        tv = load_row(coef_ptr, COEF.tv, coef_stride, rows, row_ok)
        sign = tl.where(p > r, 1.0, tl.where(p < r, -1.0, 0.0))
        inner += tv * (sign - load_row(coef_ptr, COEF.tv_mean, coef_stride, rows, row_ok))
        if (flags & FLAG.jsd) != 0:
            jsd = load_row(coef_ptr, COEF.jsd, coef_stride, rows, row_ok)
            gap = tl.minimum(tl.maximum(lr - lp, -80.0), 80.0)
            ratio = log1p(tl.load(params_ptr + PARAM.jsd) * expm1(gap))
            mean = load_row(coef_ptr, COEF.jsd_kl, coef_stride, rows, row_ok)
            inner -= _term(jsd, ratio + mean)
        if (flags & FLAG.alpha) != 0:
            alpha = load_row(coef_ptr, COEF.alpha, coef_stride, rows, row_ok)
            d += _term(alpha, exp(blend(lp, lr, tl.load(params_ptr + PARAM.alpha))) - p)
        if (flags & FLAG.renyi) != 0:
            renyi = load_row(coef_ptr, COEF.renyi, coef_stride, rows, row_ok)
            shift = load_row(coef_ptr, COEF.renyi_shift, coef_stride, rows, row_ok)
            u = blend(lp, lr, tl.load(params_ptr + PARAM.renyi)) - shift
            d += _term(renyi, exp(u) - p)
        if (flags & FLAG.mix) != 0:
            mix = load_row(coef_ptr, COEF.mix, coef_stride, rows, row_ok)
            shift = load_row(coef_ptr, COEF.mix_shift, coef_stride, rows, row_ok)
            u = blend(lp, lr, tl.load(params_ptr + PARAM.mix)) - shift
            d += _term(mix, exp(u) - p)
        if (flags & FLAG.bkl) != 0:
            bkl = load_row(coef_ptr, COEF.bkl, coef_stride, rows, row_ok)
            value = load_row(coef_ptr, COEF.top_value, coef_stride, rows, row_ok)
            index = load_row(coef_ptr, COEF.top_index, coef_stride, rows, row_ok)
            rest = p * load_row(coef_ptr, COEF.bkl_ratio, coef_stride, rows, row_ok)
            d += _term(bkl, p - tl.where(in_top(ur, v0 + cols, value, index), r, rest))
    first = tl.program_id(1) * BLOCK_V
    d = _finish(weighted(p, inner) + d, z, tl.load(params_ptr + PARAM.slope), y, v0 + first,
                w - first, live, load_row(coef_ptr, COEF.e, coef_stride, rows, row_ok),
                BLOCK_V)  # fmt: skip
    _store(dx_ptr, dx_stride, rows, cols, row_ok, col_ok, d)


@triton.jit(do_not_specialize=["flags", "which", "m", "ignore"])
def factor(
    x_ptr, xr_ptr, out_ptr, bias_ptr, ref_bias_ptr, targets_ptr, params_ptr, maxima_ptr,
    flags, which, m, w, ignore: tl.int64, x_stride: tl.int64, xr_stride: tl.int64,
    out_stride: tl.int64, max_stride: tl.int64,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What multiplies the head's rows in one sum of a frozen head, `which` of FACTORS: mass e,
    log e x, gap e - er, cross e (x - xr), each times the slope of the cap."""
    dtype: tl.constexpr = maxima_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok, col_ok = rows < m, cols < w
    _, live = load_targets(targets_ptr, rows, row_ok, ignore)
    inside = live[:, None] & col_ok[None, :]
    raw = load_products(x_ptr, x_stride, rows, cols, inside, dtype)
    z = logits(raw, bias_ptr, cols, col_ok, flags & FLAG.bias,
               tl.load(params_ptr + PARAM.factor), tl.load(params_ptr + PARAM.top),
               inside)  # fmt: skip
    x = z - load_row(maxima_ptr, MAXIMUM.policy, max_stride, rows, row_ok)
    f = exp(x)
    if which == FACTOR.log:
        f = weighted(f, x)
    if which >= FACTOR.gap:
        raw_r = load_products(xr_ptr, xr_stride, rows, cols, inside, dtype)
        zr = logits(raw_r, ref_bias_ptr, cols, col_ok, flags & FLAG.ref_bias,
                    tl.load(params_ptr + PARAM.ref_factor),
                    tl.load(params_ptr + PARAM.ref_top), inside)  # fmt: skip
        xr = zr - load_row(maxima_ptr, MAXIMUM.reference, max_stride, rows, row_ok)
        f = f - exp(xr) if which == FACTOR.gap else weighted(f, x - xr)
    slope = tl.load(params_ptr + PARAM.slope)
    if slope != 0:
        u = z * slope
        f = weighted(f, 1.0 - u * u)
    _store(out_ptr, out_stride, rows, cols, row_ok, col_ok, f)


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
    fp = tl.load(shift_ptr + SHIFT.fp * shift_stride + rows, mask=ok, other=1.0)
    fr = tl.load(shift_ptr + SHIFT.fr * shift_stride + rows, mask=ok, other=1.0)
    dp = tl.load(shift_ptr + SHIFT.dp * shift_stride + rows, mask=ok, other=0.0)
    dr = tl.load(shift_ptr + SHIFT.dr * shift_stride + rows, mask=ok, other=0.0)
    moved = (fp != 1) | (fr != 1) | (dp != 0) | (dr != 0)
    on = moved[:, None] & (cols < depth)[None, :]
    at_ptr = total_ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    mass = tl.load(at_ptr, mask=on, other=0.0)
    tl.store(at_ptr, fp[:, None] * mass, mask=on)
    for i in tl.static_range(1, 4):
        if (mask & (1 << i)) != 0:
            at_ptr += kind_stride
            total = tl.load(at_ptr, mask=on, other=0.0)
            if i == FACTOR.log:
                total = fp[:, None] * (total + dp[:, None] * mass)
            elif i == FACTOR.gap:
                total = fr[:, None] * total + (fp - fr)[:, None] * mass
            else:
                total = fp[:, None] * (total + (dp - dr)[:, None] * mass)
            tl.store(at_ptr, total, mask=on)
