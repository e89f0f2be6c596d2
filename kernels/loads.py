"""What the tile kernels read: products, biases, row constants, targets; and how a logit is made."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import narrow, tanh, widen


@triton.jit
def columns_if(flag, w):
    """w, or 0 where a flag is not set: a bound that lets nothing through."""
    return tl.where(flag != 0, w, 0)


@triton.jit
def load_products(x_ptr, stride, rows, cols, inside, dtype: tl.constexpr):
    """-inf in lanes that do not count."""
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    return widen(tl.load(x_ptr + at, mask=inside, other=float("-inf")), dtype)


@triton.jit
def load_values(ptr, stride, rows, cols, inside, dtype: tl.constexpr):
    """0 in lanes that do not count."""
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    return widen(tl.load(ptr + at, mask=inside, other=0.0), dtype)


@triton.jit
def before_cap(x, bias_ptr, cols, valid, present, factor):
    """u of products; in this order and without contraction (tiled/epilogue.py)."""
    if present != 0:
        x = x + tl.load(bias_ptr + cols, mask=valid, other=0.0)
    return x * factor


@triton.jit
def capped(u, top):
    """The logit of u; top = 0 means no cap."""
    z = u
    if top != 0:
        z = top * tanh(u)
    return z


@triton.jit
def logits(x, bias_ptr, cols, valid, present, factor, top, inside):
    """-inf in lanes that do not count, whose products are -inf: a positive factor leaves them so
    where there is no cap."""
    u = before_cap(x, bias_ptr, cols[None, :], valid[None, :], present, factor)
    return only(inside, capped(u, top), factor, top)


@triton.jit
def only(inside, z, factor, top):
    if (top != 0) | (factor <= 0):
        z = tl.where(inside, z, float("-inf"))
    return z


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
def load_targets(targets_ptr, rows, row_ok, ignore):
    """(targets [BLOCK_M] int64, rows that count). A target that no column has counts, and has no
    column; only the ignored ones do not."""
    y = tl.load(targets_ptr + rows, mask=row_ok, other=0)
    return y, row_ok & (y != ignore)


@triton.jit
def target_column(y, first, width, live):
    """The target's column counted from `first` on, int32; -1 where it is not among `width`."""
    column = y - first
    return tl.where(live & (column.to(tl.uint64) < width), column, -1).to(tl.int32)


@triton.jit
def in_top(u, v, value, index):
    """The reference's top set, by what comes before a cap: larger than the threshold, or equal and
    not after its index (a number of the fold dtype, exact up to V = 2^24)."""
    return (u > value) | ((u == value) & (v[None, :].to(u.dtype) <= index))
