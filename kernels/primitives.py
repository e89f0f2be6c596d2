"""Scalar maths of the kernels: conversions, logits, normalisers, guarded products.

Everything is elementwise or a reduction over the last axis; no kernel that uses this module holds a
`tl.dot`, so there is no tf32 question: products are library calls, sums are fp32 (fp64 for fp64).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Triton's interpreter truncates fp32 to bf16, and slowly; hardware rounds to nearest even. Under
# the interpreter the conversion is therefore spelled in integers.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # a NaN keeps its top bits and stays one; the carry would turn it into an infinity
        short = tl.where(x == x, even, (bits >> 16) | 0x40)
        return short.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """x in `dtype`, at least as wide as its own."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x; of fp32 the results below 2^-126 are 0, which saves three of five instructions."""
    if INTERPRETED or x.dtype != tl.float32:
        return tl.exp(x)
    else:
        return libdevice.exp2(x * LOG2_E)


@triton.jit
def tanh(x):
    """Rational below 0.625 (Cody and Waite's form; 1 - 2 / (e^2x + 1) would cancel there)."""
    s = x * x
    p = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
    q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s
    near = x + x * s * (p / (q + 4.84406305325125486048e3))
    a = tl.abs(x)
    far = 1.0 - 2.0 / (exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def log1p(x):
    """log(1 + x); the quotient repairs what rounding 1 + x lost."""
    u = 1.0 + x
    d = u - 1.0
    return tl.where(d == 0, x, tl.log(u) * (x / tl.where(d == 0, 1.0, d)))


@triton.jit
def expm1(x):
    """e^x - 1 for |x| <= 80; the quotient repairs what rounding e^x lost."""
    u = exp(x)
    d = u - 1.0
    rest = tl.where((d == 0) | (d == -1.0), 1.0, tl.log(u))
    return tl.where(d == 0, x, tl.where(d == -1.0, -1.0, d * (x / rest)))


@triton.jit
def safe(m):
    """The maximum to subtract: 0 where there is nothing but -inf, so that -inf - m is no NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def weighted(p, x):
    """p * x with 0 * anything = 0."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def blend(x, xr, a):
    """x + a (xr - x); -inf where either is -inf and has weight. Equal logits give x itself."""
    u = tl.where(a == 0, x, tl.where(a == 1, xr, x + a * (xr - x)))
    return tl.where(u == u, u, float("-inf"))


@triton.jit
def _larger_of_both(a0, b0, a1, b1):
    return tl.maximum(a0, a1), tl.maximum(b0, b1)


@triton.jit
def _add_2(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def _add_4(a0, b0, c0, d0, a1, b1, c1, d1):
    return a0 + a1, b0 + b1, c0 + c1, d0 + d1


# Several reductions over the last axis in one: the warps of a program meet once. The interpreter
# would call the function above once per element.
@triton.jit
def max_2(a, b):
    if INTERPRETED:
        return tl.max(a, axis=1), tl.max(b, axis=1)
    else:
        return tl.reduce((a, b), 1, _larger_of_both)


@triton.jit
def sum_2(a, b):
    if INTERPRETED:
        return tl.sum(a, axis=1), tl.sum(b, axis=1)
    else:
        return tl.reduce((a, b), 1, _add_2)


@triton.jit
def sum_4(a, b, c, d):
    if INTERPRETED:
        return tl.sum(a, axis=1), tl.sum(b, axis=1), tl.sum(c, axis=1), tl.sum(d, axis=1)
    else:
        return tl.reduce((a, b, c, d), 1, _add_4)


@triton.jit
def relative(z, m):
    """(z - m, e^(z - m)) for a maximum m [M]; -inf entries count nothing."""
    x = z - safe(m)[:, None]
    return x, exp(x)


@triton.jit
def normaliser(z):
    """(max [M], sum of e^(z - max) [M], z - max, e^(z - max)); -inf entries count nothing."""
    m = tl.max(z, axis=1)
    x, e = relative(z, m)
    return m, tl.sum(e, axis=1), x, e
