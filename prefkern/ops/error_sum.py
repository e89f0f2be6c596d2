"""error_sum: prediction errors of diffusion models, reduced without a tensor of squared errors.

Shapes: B samples, D elements of a sample, F frames (entries of the axis that segments cut), n
statistics. The op sees [B, O, F, I]: O the axes before the frames, I the axes after them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from . import shared, transforms

STATS = ("err", "ref_err", "dot", "huber")
REDUCTIONS = ("mean", "sum", "mean_all")
MOST_SEGMENTS = 2**31 - 1


class ErrorSums(NamedTuple):
    """Reduced prediction errors, each `[B]`, or `[B, num_segments]`, fp64; None if not asked for.

    p is the prediction, t the target, q the reference's prediction.
    """

    err: Tensor | None = None  # sum (p - t)^2
    ref_err: Tensor | None = None  # sum (q - t)^2; constant
    dot: Tensor | None = None  # sum p (t - q)
    huber: Tensor | None = None  # sum sqrt((p - t)^2 + c^2) - c


def error_sum(
    pred: Tensor,  # [B, ...]
    target: Tensor,  # [B, ...]
    ref: Tensor | None = None,  # [B, ...]
    *,
    stats: tuple[str, ...] | None = None,
    segments: Tensor | None = None,  # [F]
    num_segments: int | None = None,
    segment_dim: int = 1,
    reduction: str = "mean",
    backend: str = "auto",
) -> ErrorSums:
    """Prediction errors per sample, or per segment of a sample, accumulated in fp64.

    err = sum (p - t)^2,  ref_err = sum (q - t)^2,  dot = sum p (t - q),
    huber:c = sum sqrt((p - t)^2 + c^2) - c

    Nothing of the size of a sample is stored. `err - ref_err` keeps its digits: with fp32 means it
    would be off by 2e-8, which a beta of 5000 turns into 1e-4 of logit; here it is off by 2e-15.

    Args:
        pred: `[B, ...]` float, the model's prediction (noise, velocity, a transition's mean). The
            only differentiable argument.
        target: `[B, ...]` what it should have been. Constant.
        ref: `[B, ...]` the reference's prediction. Constant. Default None.
        stats: Names among err, ref_err, dot and huber:c with c > 0. Default err, with a reference
            also ref_err.
        segments: `[F]` segment of each entry of axis `segment_dim`, int; negative leaves the entry
            out, whatever it holds. Default None, one number per sample.
        num_segments: Number of segments, required with `segments` (which are below it).
        segment_dim: Axis of `pred` that segments cut, >= 1, default 1.
        reduction: "mean" over the elements of the sample (of the segment), "sum", or "mean_all":
            segment sums over the elements of all segments together. Default "mean".
        backend: "auto" or a backend name.

    Returns:
        ErrorSums of `[B]` or `[B, num_segments]` fp64; a segment without elements gives 0.

    Raises:
        ValueError: shapes, dtypes, segments or statistics that do not fit; target or ref that
            require grad.

    >>> p, t = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    >>> error_sum(p, t).err
    tensor([2.5000], dtype=torch.float64)
    """
    _check_tensors(pred, target, ref)
    names = _stats(stats, ref is not None)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}.")
    if segments is None:
        if num_segments is not None:
            raise ValueError("num_segments comes with segments [F]; pass both or none.")
        shape, count = (pred.shape[0], 1, 1, math.prod(pred.shape[1:])), 1
    else:
        segments, count = _check_segments(segments, num_segments, segment_dim, pred)
        before, after = pred.shape[1:segment_dim], pred.shape[segment_dim + 1 :]
        shape = (pred.shape[0], math.prod(before), pred.shape[segment_dim], math.prod(after))
    text = ",".join(names)
    transforms.refuse_forward_mode(pred)
    chosen = shared.choose_backend("error_sum", pred.device, pred.dtype, None, "", backend, None)
    sums = _FORWARD(
        pred.reshape(shape).contiguous(),
        target.detach().reshape(shape).contiguous(),
        None if ref is None else ref.detach().reshape(shape).contiguous(),
        segments,
        count,
        text,
        chosen,
    )  # [n, B, segments]
    if reduction != "sum":
        sums = sums / _elements(segments, count, shape, reduction)
    fields = {}
    for name, column in zip(names, sums.unbind(0), strict=True):
        column = column.detach() if name == "ref_err" else column
        fields[name.partition(":")[0]] = column if segments is not None else column[:, 0]
    return ErrorSums(**fields)


def _check_tensors(pred: Tensor, target: Tensor, ref: Tensor | None) -> None:
    checks.check_float("pred", pred)
    if pred.dim() < 2:
        raise ValueError(
            f"pred must be [B, ...] with at least one axis of elements, got "
            f"{checks.shape_text(pred)}; add the batch axis with pred[None]."
        )
    given = (("target", target),) if ref is None else (("target", target), ("ref", ref))
    for name, other in given:
        checks.check_float(name, other)
        if other.shape != pred.shape:
            raise ValueError(
                f"{name} must be {checks.shape_text(pred)} to match pred, got "
                f"{checks.shape_text(other)}."
            )
        checks.check_same_device(name, other, "pred", pred)
        checks.check_constant(name, other)


def _stats(stats: tuple[str, ...] | None, has_ref: bool) -> tuple[str, ...]:
    if stats is None:
        return ("err", "ref_err") if has_ref else ("err",)
    if not isinstance(stats, (str, list, tuple)):
        raise ValueError(
            f"stats must be names among {STATS}, got {stats!r}; as in stats=('err', 'ref_err')."
        )
    stats = (stats,) if isinstance(stats, str) else tuple(stats)
    seen: list[str] = []
    texts = []
    for text in stats:
        name, _, raw = str(text).partition(":")
        if name not in STATS or name in seen or (bool(raw) != (name == "huber")):
            raise ValueError(
                f"stats must be distinct names among {STATS}, huber with its width as in "
                f"'huber:0.001', got {stats}."
            )
        if name == "huber":
            text = f"huber:{_width(text, raw)!r}"  # one spelling of a number for every backend
        if name in ("ref_err", "dot") and not has_ref:
            raise ValueError(f"the statistic {name!r} needs ref [B, ...], got none; pass it.")
        seen.append(name)
        texts.append(str(text))
    if not seen:
        raise ValueError(f"stats must name at least one of {STATS}, got none.")
    return tuple(texts)


def _width(text: str, raw: str) -> float:
    try:
        width = float(raw)
    except ValueError:
        width = math.nan
    if not 0.0 < width < math.inf:
        raise ValueError(f"the width of huber must be a finite number > 0, got {text!r}.")
    return width


def _check_segments(
    segments: Tensor, num_segments: int | None, segment_dim: int, pred: Tensor
) -> tuple[Tensor, int]:
    checks.check_tensor("segments", segments)
    axis = isinstance(segment_dim, int) and not isinstance(segment_dim, bool)
    if not axis or not 1 <= segment_dim < pred.dim():
        raise ValueError(
            f"segment_dim must be an axis of pred {checks.shape_text(pred)} after the first, got "
            f"{segment_dim}."
        )
    frames = pred.shape[segment_dim]
    if segments.dtype not in (torch.int32, torch.int64) or tuple(segments.shape) != (frames,):
        raise ValueError(
            f"segments must be integers [F] = [{frames}], one per entry of axis {segment_dim} of "
            f"pred, got {segments.dtype} {checks.shape_text(segments)}."
        )
    checks.check_same_device("segments", segments, "pred", pred)
    if isinstance(num_segments, bool) or not isinstance(num_segments, int) or num_segments < 1:
        raise ValueError(
            f"num_segments must be an int >= 1 with segments (reading it from them would "
            f"synchronise a GPU), got {num_segments!r}."
        )
    if num_segments > MOST_SEGMENTS:
        raise ValueError(f"num_segments must be at most {MOST_SEGMENTS}, got {num_segments}.")
    if segments.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(segments, num_segments)
    # Out of range stays out of range in 32 bits: 2^32 would become segment 0.
    return segments.clamp(-1, num_segments).to(torch.int32).contiguous(), num_segments


def _check_range(segments: Tensor, num_segments: int) -> None:
    """Reads values: CPU tensors only."""
    if bool((segments >= num_segments).any()):
        raise ValueError(
            f"segments must be below num_segments = {num_segments}, got {int(segments.max())}."
        )


def _elements(
    segments: Tensor | None, count: int, shape: tuple[int, int, int, int], reduction: str
) -> Tensor | int:
    """Elements of a sample, or of each of its segments [num_segments]; at least 1."""
    per_frame = shape[1] * shape[3]
    if segments is None:
        return max(per_frame, 1)
    member = segments[:, None] == torch.arange(count, device=segments.device)  # [F, segments]
    frames = member.sum(0, dtype=torch.float64)
    total = frames if reduction == "mean" else frames.sum()
    return (total * per_frame).clamp(min=1.0)


@torch.library.custom_op("prefkern::error_sum_fwd", mutates_args=())
def _fwd(
    pred: Tensor,
    target: Tensor,
    ref: Tensor | None,
    segments: Tensor | None,
    num_segments: int,
    stats: str,
    backend: str,
) -> Tensor:
    """[n, B, num_segments] fp64."""
    if segments is not None and segments.device.type == "cpu":
        _check_range(segments, num_segments)
    return shared.run(backend, "error_sum_fwd", pred, target, ref, segments, num_segments, stats)


@_fwd.register_fake
def _(pred, target, ref, segments, num_segments, stats, backend):
    shape = (len(stats.split(",")), pred.shape[0], num_segments)
    return pred.new_empty(shape, dtype=torch.float64)


@torch.library.custom_op("prefkern::error_sum_bwd", mutates_args=())
def _bwd(
    d_out: Tensor,
    pred: Tensor,
    target: Tensor,
    ref: Tensor | None,
    segments: Tensor | None,
    stats: str,
    backend: str,
) -> Tensor:
    """d_pred, like pred."""
    return shared.run(
        backend, "error_sum_bwd", d_out.contiguous(), pred, target, ref, segments, stats
    )


@_bwd.register_fake
def _(d_out, pred, target, ref, segments, stats, backend):
    return torch.empty_like(pred)


def _setup_context(ctx, inputs, output) -> None:
    pred, target, ref, segments, _, ctx.stats, ctx.backend = inputs
    # q is read again for the slope of `dot` only
    ref = ref if "dot" in ctx.stats.split(",") else None
    ctx.present = (ref is not None, segments is not None)
    ctx.save_for_backward(pred, target, *(x for x in (ref, segments) if x is not None))


def _backward(ctx, d_out):
    pred, target, *rest = ctx.saved_tensors
    ref = rest.pop(0) if ctx.present[0] else None
    segments = rest.pop(0) if ctx.present[1] else None
    d_pred = _BACKWARD(d_out, pred, target, ref, segments, ctx.stats, ctx.backend)
    return d_pred, None, None, None, None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)
transforms.refuse_double_backward("prefkern::error_sum_bwd")
_FORWARD = transforms.Differentiable(
    torch.ops.prefkern.error_sum_fwd, _backward, setup_context=_setup_context
)
_BACKWARD = transforms.Differentiable(torch.ops.prefkern.error_sum_bwd)
