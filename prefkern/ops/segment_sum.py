"""segment_sum: weighted fp64 sums of token values over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from . import shared, transforms


def segment_sum(
    values: Tensor,  # [N] or [m, N]
    cu_seqlens: Tensor,  # [S+1] int32
    *,
    weights: Tensor | None = None,  # [N] or [m, N]
    backend: str = "auto",
) -> Tensor:  # [S] or [m, S] fp64
    """out[j, s] = sum over tokens i of sequence s of weights[i] * values[j, i], in fp64.

    fp32 sums of log-probabilities near 1e4 nats lose 2e-3; fp64 does not.

    Args:
        values: `[N]` or `[m, N]` float, m statistics at once.
        cu_seqlens: Boundaries `[S+1]` int32, from 0 to N, never decreasing; empty sequences give 0.
        weights: `[N]` for all rows of values, or `[m, N]`. A weight of 0 hides any value, also NaN.
            May require grad: its gradient is the value. Default None (1).
        backend: "auto" or a backend name.

    Returns:
        `[S]` or `[m, S]` fp64.

    Raises:
        ValueError: boundaries or shapes that do not fit.
    """
    checks.check_float("values", values)
    if values.dim() not in (1, 2):
        raise ValueError(
            f"values must be [N] or [m, N], got {checks.shape_text(values)}; flatten the tokens."
        )
    n = values.shape[-1]
    cu_seqlens = checks.check_cu_seqlens(cu_seqlens, n)
    checks.check_same_device("cu_seqlens", cu_seqlens, "values", values)
    rows = values if values.dim() == 2 else values[None]
    if weights is not None:
        checks.check_float("weights", weights)
        checks.check_same_device("weights", weights, "values", values)
        if tuple(weights.shape) not in ((n,), tuple(rows.shape)):
            raise ValueError(
                f"weights must be [N] = [{n}] or {checks.shape_text(rows)} to match values, got "
                f"{checks.shape_text(weights)}."
            )
        weights = weights.contiguous()
    if values.dtype in (torch.bfloat16, torch.float16):
        rows = rows.float()  # exact; backends sum fp32 and fp64
    if weights is not None and weights.dtype in (torch.bfloat16, torch.float16):
        weights = weights.float()
    transforms.refuse_forward_mode(values, weights)
    chosen = shared.choose_backend(
        "segment_sum",
        values.device,
        rows.dtype,
        None,
        "",
        backend,
        shared.shape_for_message(n, 0, 0),
    )
    out = _FORWARD(rows.contiguous(), weights, checks.narrow_boundaries(cu_seqlens, n), chosen)
    return out.reshape(values.shape[:-1] + out.shape[-1:])


@torch.library.custom_op("prefkern::segment_sum_fwd", mutates_args=())
def _fwd(values: Tensor, weights: Tensor | None, cu_seqlens: Tensor, backend: str) -> Tensor:
    """[m, S] fp64."""
    if cu_seqlens.device.type == "cpu":
        checks.check_boundaries(cu_seqlens, values.shape[1], name="cu_seqlens", of="tokens")
    return shared.run(backend, "segment_sum_fwd", values, weights, cu_seqlens)


@_fwd.register_fake
def _(values, weights, cu_seqlens, backend):
    return values.new_empty((values.shape[0], cu_seqlens.shape[0] - 1), dtype=torch.float64)


@torch.library.custom_op("prefkern::segment_sum_bwd", mutates_args=())
def _bwd(
    d_out: Tensor,
    values: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor,
    need_values: bool,
    need_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(d_values [m, N], d_weights like weights); [0] where not needed."""
    return shared.run(
        backend,
        "segment_sum_bwd",
        d_out.contiguous(),
        values,
        weights,
        cu_seqlens,
        need_values,
        need_weights,
    )


@_bwd.register_fake
def _(d_out, values, weights, cu_seqlens, need_values, need_weights, backend):
    d_weights = torch.empty_like(weights) if need_weights else values.new_empty(0)
    return torch.empty_like(values) if need_values else values.new_empty(0), d_weights


def _setup_context(ctx, inputs, output) -> None:
    values, weights, cu_seqlens, ctx.backend = inputs
    ctx.has_weights = weights is not None
    ctx.save_for_backward(values, cu_seqlens, *((weights,) if ctx.has_weights else ()))


def _backward(ctx, d_out):
    values, cu_seqlens, *rest = ctx.saved_tensors
    need_values, need_weights = ctx.needs_input_grad[:2]
    d_values, d_weights = _BACKWARD(
        d_out,
        values,
        rest[0] if ctx.has_weights else None,
        cu_seqlens,
        need_values,
        need_weights,
        ctx.backend,
    )
    return d_values if need_values else None, d_weights if need_weights else None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)
transforms.refuse_double_backward("prefkern::segment_sum_bwd")
_FORWARD = transforms.Differentiable(
    torch.ops.prefkern.segment_sum_fwd, _backward, setup_context=_setup_context
)
_BACKWARD = transforms.Differentiable(torch.ops.prefkern.segment_sum_bwd)
