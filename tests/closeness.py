"""The three-way rule: a candidate may be twice as wrong as plain PyTorch, plus a stated floor.

    err(candidate, oracle) <= factor * err(baseline, oracle) + floor     in maximum and in RMS

The oracle is float64. The baseline is what a careful person writes without a fused op
(tests/baseline.py) in the same working dtype, so the rule asks "does fusing cost accuracy?" and
needs no tolerance tuned to a shape. The floor covers one thing only: a baseline that was right by
luck (a single row, a result that happens to be representable). It is a multiple of the unit
roundoff at the size of the terms summed:

statistics  ROUNDINGS * eps(float32 | float64) * largest |logit|: the result is a difference of
            numbers of that size. alpha and renyi divide by a(1-a) and 1-a, which scales it.
            `logp, lse, zy, zmean` of 16-bit inputs add eps(dtype)/2 * largest |logit|, since they
            may be folded from logits rounded once to the working dtype. All other statistics are
            folded from unrounded logits, so 16-bit inputs get the float32 floor.
gradients   float32, float64: ROUNDINGS * eps * largest |logit| * largest sum of |terms|, because an
            error of eps |z| in a logit is a relative error of that size in p, of a whole row.
            16-bit: the result is rounded once, eps/2 |result|; every dz is rounded once and made
            from a logit that was rounded once, eps/2 (1 + |z|) each and independent, so they add up
            as the root of a sum of squares: eps/2 (1 + largest |logit|) * root of sum of terms^2.

Floors in RMS use the RMS of these sizes instead of the largest and, for 16 bits, are divided by the
root of the number of independent roundings that carry the sum (`carriers`): that is how fast an RMS
over many roundings stops being luck, and it is what lets the rule see a narrow accumulator under
16-bit inputs. Never softened in CI.
"""

from __future__ import annotations

import numpy as np
import torch
from oracles import Truth, as_f64

FACTOR = 2.0
ROUNDINGS = 8  # a product, a maximum, an exp, a log, two sums and a difference each round once
FOLDED_ROUNDED = ("logp", "lse", "zy", "zmean")


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def stat_floor(stat: str, dtype: torch.dtype, largest_logit: float) -> float:
    """Floor of one statistic; see the module's table."""
    name, _, text = stat.partition(":")
    size = max(1.0, largest_logit)
    amplify = 1.0
    if name == "alpha":
        amplify = 1 / (float(text) * (1 - float(text)))
    if name == "renyi":
        amplify = 1 / (1 - float(text))
    floor = ROUNDINGS * amplify * eps(stat_dtype(dtype)) * size
    if name in FOLDED_ROUNDED and dtype in (torch.bfloat16, torch.float16):
        floor += eps(dtype) / 2 * size
    return floor


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean())) if x.size else 0.0


def carriers(x: np.ndarray) -> float:
    """How many entries carry the sum of squares: n where n are equal, 1 where one dominates."""
    total = float((x**2).sum())
    return max(1.0, total**2 / float((x**4).sum())) if total > 0 else 1.0


def grad_floor(
    dtype: torch.dtype, largest_logit: float, truth: Truth, name: str
) -> tuple[float, float]:
    """Floors of one gradient in maximum and RMS."""
    result, size, spread = truth.grads[name], truth.sizes[name], truth.spreads[name]
    if result.size == 0:
        return 0.0, 0.0
    if dtype not in (torch.bfloat16, torch.float16):
        unit = ROUNDINGS * eps(dtype) * max(1.0, largest_logit)
        return unit * float(size.max()), unit * rms(size)
    half, logit = eps(dtype) / 2, 1 + largest_logit
    return (
        half * (float(np.abs(result).max()) + logit * float(spread.max())),
        half
        * (rms(result) / carriers(result) ** 0.5 + logit * rms(spread) / carriers(truth.dx) ** 0.5),
    )


def assert_no_worse(
    candidate,
    baseline,
    oracle,
    *,
    factor: float = FACTOR,
    floor: float | tuple[float, float] = 0.0,  # one number, or (maximum, RMS)
    what: str = "result",
) -> None:
    """Fails unless err(candidate) <= factor * err(baseline) + floor, naming the worst entry."""
    got, base, want = as_f64(candidate), as_f64(baseline), as_f64(oracle)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, the oracle has {want.shape}"
    assert base.shape == want.shape, (
        f"{what}: baseline of shape {base.shape}, the oracle has {want.shape}"
    )
    if want.size == 0:
        return
    floor_max, floor_rms = floor if isinstance(floor, tuple) else (floor, floor)
    odd = ~np.isfinite(want)
    if odd.any():
        same = got[odd] == want[odd]
        assert same.all(), (
            f"{what}: the oracle is {want[odd][~same][0]} where the result is {got[odd][~same][0]}"
        )
        got, base, want = (np.where(odd, 0.0, x) for x in (got, base, want))
    bad = ~np.isfinite(got)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {got.size} entries are not finite, first {at}: "
            f"got {got[at]}, oracle {want[at]:.9g}"
        )
    # a baseline that overflows says nothing; judge the candidate by the floor alone there
    err, err_base = np.abs(got - want), np.abs(np.where(np.isfinite(base), base, want) - want)
    at = tuple(int(i) for i in np.unravel_index(int(err.argmax()), err.shape))
    limit_max = factor * float(err_base.max()) + floor_max
    worst_base, rms_err, rms_base = float(err_base.max()), rms(err), rms(err_base)
    limit_rms = factor * rms_base + floor_rms
    if err[at] > limit_max or rms_err > limit_rms:
        raise AssertionError(
            f"{what}: worse than {factor:g}x the baseline\n"
            f"  worst at {at} of {got.shape}: "
            f"got {got[at]:.9g}, baseline {base[at]:.9g}, oracle {want[at]:.9g}\n"
            f"  max error {err[at]:.3e}, allowed {limit_max:.3e} "
            f"= {factor:g} * {worst_base:.3e} + {floor_max:.3e}\n"
            f"  rms error {rms_err:.3e}, allowed {limit_rms:.3e} "
            f"= {factor:g} * {rms_base:.3e} + {floor_rms:.3e}\n"
            f"  {int((err > limit_max).sum())} of {err.size} entries beyond the maximum allowed"
        )


def assert_same_bits(
    got: torch.Tensor | None, want: torch.Tensor | None, what: str = "result"
) -> None:
    """Fails unless both have the same dtype, shape and bits (NaN equals NaN in the same place)."""
    if got is None or want is None:
        assert got is want, f"{what}: one is None, the other is not"
        return
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: {got.dtype} {tuple(got.shape)} against {want.dtype} {tuple(want.shape)}"
    )
    differ = (got != want) & ~(got.isnan() & want.isnan())
    if bool(differ.any()):
        at = tuple(int(i) for i in differ.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {got.numel()} entries differ, first {at}: "
            f"{got[at].item():.9g} against {want[at].item():.9g}"
        )
