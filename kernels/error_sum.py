"""error_sum: fp64 reductions of prediction errors over samples and segments, and their gradient.

Shapes: B samples, F frames (entries of the axis that segments cut), O and I the axes before and
after them, n statistics. A program owns a part of one frame of one sample and reads its elements
once for all statistics; frames and parts are added afterwards in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch
from .primitives import narrow, widen

NAMES = ("err", "ref_err", "dot", "huber")
PART = 1 << 15  # elements of a frame for which one more program is started
MOST_PARTS = 64


@triton.jit
def _unit(frames):
    """(sample, frame) of this program, and the number of samples. Both share the first axis of the
    grid: the others end at 65,535."""
    b = tl.program_id(0) // frames
    return b, tl.program_id(0) - b * frames, tl.num_programs(0) // frames


@triton.jit
def _offsets(e, b, f, outer, frames, inner):
    """Where elements e of the [O, I] of a frame lie in [B, O, F, I]."""
    o = e // inner
    return ((b.to(tl.int64) * outer + o) * frames + f) * inner + (e - o * inner)


@triton.jit(
    do_not_specialize=["stats", "outer", "frames", "inner", "err", "ref_err", "dot", "huber"]
)
def sum_kernel(
    pred,  # [B, O, F, I]
    target,  # [B, O, F, I]
    ref,  # [B, O, F, I], read for ref_err and dot
    width,  # [1] fp64, of huber
    out,  # [parts, n, B, F] fp64
    stats,  # n
    outer,
    frames,
    inner,
    err,  # row of out, negative: not wanted; as the next three
    ref_err,
    dot,
    huber,
    BLOCK: tl.constexpr,
):
    b, f, samples = _unit(frames)
    part, parts = tl.program_id(1), tl.num_programs(1)
    c = tl.load(width)
    sum_err = tl.zeros((BLOCK,), tl.float64)
    sum_ref = tl.zeros((BLOCK,), tl.float64)
    sum_dot = tl.zeros((BLOCK,), tl.float64)
    sum_huber = tl.zeros((BLOCK,), tl.float64)
    for first in range(part * BLOCK, outer * inner, parts * BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < outer * inner
        at = _offsets(e, b, f, outer, frames, inner)
        p = widen(tl.load(pred + at, mask=inside, other=0.0), tl.float64)
        t = widen(tl.load(target + at, mask=inside, other=0.0), tl.float64)
        square = (p - t) * (p - t)
        sum_err += square
        if (ref_err >= 0) | (dot >= 0):
            q = widen(tl.load(ref + at, mask=inside, other=0.0), tl.float64)
            sum_ref += (q - t) * (q - t)
            sum_dot += p * (t - q)
        if huber >= 0:
            # sqrt(d^2 + c^2) - c without the difference of two close numbers
            sum_huber += tl.where(inside, square / (tl.sqrt(square + c * c) + c), 0.0)
    place = out + (part.to(tl.int64) * stats * samples + b) * frames + f
    step = samples.to(tl.int64) * frames
    if err >= 0:
        tl.store(place + err * step, tl.sum(sum_err, 0))
    if ref_err >= 0:
        tl.store(place + ref_err * step, tl.sum(sum_ref, 0))
    if dot >= 0:
        tl.store(place + dot * step, tl.sum(sum_dot, 0))
    if huber >= 0:
        tl.store(place + huber * step, tl.sum(sum_huber, 0))


@triton.jit(do_not_specialize=["outer", "frames", "inner", "err", "dot", "huber"])
def gradient_kernel(
    factors,  # [n, B, F] fp64, what reaches the sums of each frame; 0 where a frame is left out
    pred,  # [B, O, F, I]
    target,  # [B, O, F, I]
    ref,  # [B, O, F, I], read for dot
    width,  # [1] fp64, of huber
    d_pred,  # [B, O, F, I]
    outer,
    frames,
    inner,
    err,  # row of factors, negative: none; as the next two
    dot,
    huber,
    BLOCK: tl.constexpr,
):
    b, f, samples = _unit(frames)
    part, parts = tl.program_id(1), tl.num_programs(1)
    c = tl.load(width)
    place = factors + b.to(tl.int64) * frames + f
    step = samples.to(tl.int64) * frames
    of_err = tl.full((), 0.0, tl.float64)
    of_dot = tl.full((), 0.0, tl.float64)
    of_huber = tl.full((), 0.0, tl.float64)
    if err >= 0:
        of_err = tl.load(place + err * step)
    if dot >= 0:
        of_dot = tl.load(place + dot * step)
    if huber >= 0:
        of_huber = tl.load(place + huber * step)
    for first in range(part * BLOCK, outer * inner, parts * BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < outer * inner
        at = _offsets(e, b, f, outer, frames, inner)
        p = widen(tl.load(pred + at, mask=inside, other=0.0), tl.float64)
        t = widen(tl.load(target + at, mask=inside, other=0.0), tl.float64)
        # no number times 0 is anything but 0 here
        grad = tl.where(of_err == 0.0, 0.0, of_err * 2.0 * (p - t))
        if dot >= 0:
            q = widen(tl.load(ref + at, mask=inside, other=0.0), tl.float64)
            grad += tl.where(of_dot == 0.0, 0.0, of_dot * (t - q))
        if huber >= 0:
            slope = (p - t) / tl.sqrt((p - t) * (p - t) + c * c)
            grad += tl.where(of_huber == 0.0, 0.0, of_huber * slope)
        tl.store(d_pred + at, narrow(grad, d_pred.dtype.element_ty), mask=inside)


def error_sum_fwd(
    pred: Tensor,  # [B, O, F, I]
    target: Tensor,
    ref: Tensor | None,
    segments: Tensor | None,  # [F] int32
    num_segments: int,
    stats: str,
) -> Tensor:
    """[n, B, num_segments] fp64."""
    rows, width = _parse(stats, pred)
    samples, outer, frames, inner = pred.shape
    p, t, q = _same_type(pred, target, ref)
    parts = _parts(outer * inner)
    out = p.new_empty((parts, len(rows), samples, frames), dtype=torch.float64)
    launch(
        "error_sum", (samples * frames, parts), p, t, q, width, out, len(rows), outer, frames,
        inner, *(rows.get(name, -1) for name in NAMES),
    )  # fmt: skip
    per_frame = out.sum(0)  # [n, B, F]
    if segments is None:
        return per_frame.sum(2, keepdim=True)
    segment = torch.arange(num_segments, device=pred.device)
    member = segments[:, None] == segment  # [F, num_segments]
    return torch.where(member, per_frame[..., None], 0.0).sum(2)


def error_sum_bwd(
    d_out: Tensor,  # [n, B, num_segments]
    pred: Tensor,
    target: Tensor,
    ref: Tensor | None,
    segments: Tensor | None,
    stats: str,
) -> Tensor:
    """d_pred, like pred."""
    rows, width = _parse(stats, pred)
    samples, outer, frames, inner = pred.shape
    p, t, q = _same_type(pred, target, ref)
    d_pred = torch.empty_like(p)
    factors = d_out.double()
    if segments is None:
        factors = factors.expand(-1, -1, frames)
    else:
        factors = factors[:, :, segments.long().clamp(min=0)].where(segments >= 0, 0.0)
    launch(
        "error_gradient", (samples * frames, _parts(outer * inner)), factors.contiguous(), p, t, q,
        width, d_pred, outer, frames, inner,
        *(rows.get(name, -1) for name in NAMES if name != "ref_err"),
    )  # fmt: skip
    return d_pred.to(pred.dtype)


def _parse(stats: str, like: Tensor) -> tuple[dict[str, int], Tensor]:
    """Row of each statistic, and the width of huber as a device number (1 without one)."""
    names = [text.partition(":") for text in stats.split(",")]
    widths = [float(parameter) for _, _, parameter in names if parameter]
    width = torch.full((1,), (*widths, 1.0)[0], dtype=torch.float64, device=like.device)
    return {name: row for row, (name, _, _) in enumerate(names)}, width


def _same_type(pred: Tensor, target: Tensor, ref: Tensor | None) -> tuple[Tensor, ...]:
    """All three in one dtype (the widest, exact), contiguous; pred stands in for no reference."""
    given = (pred, target, pred if ref is None else ref)
    dtype = pred.dtype
    for x in given[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype).contiguous() for x in given)


def _parts(elements: int) -> int:
    return min(MOST_PARTS, max(1, elements // PART))
