"""linear_logps: statistics of the next-token distribution from hidden states and the head.

Shapes: N tokens, V vocabulary, D hidden size, n requested statistics.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .. import checks
from ..head import HeadLike, as_head
from ..stats import FROZEN_STATS, NO_GRADIENT, ONE_MODEL_STATS, TokenStats, parse_stats
from . import budget, shared


def linear_logps(
    hidden: Tensor,  # [N, D] or [B, T, D]
    head: HeadLike,  # [V, D]
    targets: Tensor,  # [N] or [B, T] int64
    *,
    ignore_index: int = -100,
    stats: str | tuple[str, ...] = ("logp",),
    num_scored: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Per-token statistics of softmax(z) without holding the [N, V] logits.

    z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature

    Args:
        hidden: Last hidden states `[N, D]` or `[B, T, D]`; fp32, bf16, fp16 or fp64. Under autocast
            the product runs in the autocast dtype.
        head: Weight `[V, D]`, an nn.Linear, or a `Head` with bias, scale, soft cap, temperature.
        targets: Labels already shifted, in [0, V) or `ignore_index`. Ignored rows cost nothing,
            give exactly 0 and no gradient, whatever their hidden state holds.
        ignore_index: Label of rows to leave out. Default -100.
        stats: Names among logp, lse, zy, ent, col, top1, zmean (`TokenStats`). Default ("logp",).
        num_scored: Number of rows that are not ignored, where the host must know it: on CUDA, None
            costs one synchronisation (and no compaction under graph capture). Default None.
        memory_budget: Bytes of logits kept for the backward; 0 recomputes them. Changes time, not
            one bit of a result. Default: a constant per device.
        backend: "auto" or a name from `prefkern.backends.choice.backend_names()`.

    Returns:
        TokenStats; each requested field has the shape of `targets`, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes, dtypes, devices, labels or names that cannot be; an explicit backend
            that cannot serve the call.

    Gradients reach hidden, weight and bias; top1 and zmean have none. Double backward is refused.
    Source: formulas of the log-softmax; recompute scheme of Wijmans et al. 2024 (Cut Your Losses).
    """
    checks.check_integer_targets("targets", targets)
    head = as_head(head)
    weight, bias = head.weight, head.bias
    checks.check_head(hidden, weight, targets, bias)
    budget.check_budget(memory_budget)
    parsed = parse_stats(stats, allowed=ONE_MODEL_STATS)

    dtype = shared.compute_dtype(hidden)
    rows = shared.rows_of(hidden, dtype)
    n, v, d = rows.shape[0], weight.shape[0], weight.shape[1]
    names = ",".join(str(s) for s in parsed)
    chosen = shared.resolve(
        "linear_logps", hidden.device.type, dtype, weight.dtype, names, backend,
        shared.shape_for_message(n, v, d),
    )  # fmt: skip
    frozen = frozen_head(hidden, weight, bias, parsed)
    scored = budget.count_scored(targets, ignore_index, num_scored)
    kept = 0
    if not frozen and needs_gradient(hidden, weight, bias):
        kept = budget.rows_kept(scored, v, dtype.itemsize, memory_budget, hidden.device)
    out, _, _, _ = torch.ops.prefkern.linear_logps_fwd(
        rows, weight.contiguous(), targets.reshape(-1).long().contiguous(),
        None if bias is None else bias.contiguous(), float(head.scale),
        None if head.softcap is None else float(head.softcap), float(head.temperature),
        ignore_index, names, kept, frozen, num_scored, chosen,
    )  # fmt: skip
    return shared.to_token_stats(out, parsed, targets.shape)


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def frozen_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, parsed: tuple) -> bool:
    """True when only hidden needs a gradient and every statistic's logit gradient can be folded to
    one [N, D] row in the forward (2 products instead of 3 or 4)."""
    return (
        needs_gradient(hidden)
        and not needs_gradient(weight, bias)
        and all(s.name in FROZEN_STATS for s in parsed)
    )


def frozen_rows(stats: str) -> int:
    """How many [N, D] rows the frozen path returns: one per differentiable statistic."""
    return sum(name.partition(":")[0] not in NO_GRADIENT for name in stats.split(","))


@torch.library.custom_op("prefkern::linear_logps_fwd", mutates_args=())
def _fwd(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    stats: str,
    cache_rows: int,
    frozen: bool,
    num_scored: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved [1, N], cache [cache_rows, V] or [0], rows [n', N, D] or [0])."""
    if targets.device.type == "cpu":
        checks.check_target_range(targets, weight.shape[0], ignore_index)
        checks.check_num_scored(targets, ignore_index, num_scored)
    return shared.run(backend, "linear_logps_fwd",
        hidden, weight, targets, bias, scale, softcap, temperature, ignore_index,
        tuple(stats.split(",")), cache_rows, frozen, num_scored,
    )  # fmt: skip


@_fwd.register_fake
def _(
    hidden, weight, targets, bias, scale, softcap, temperature, ignore_index, stats, cache_rows,
    frozen, num_scored, backend,
):  # fmt: skip
    n, d = hidden.shape
    acc = shared.stat_dtype(hidden.dtype)
    out = hidden.new_empty((len(stats.split(",")), n), dtype=acc)
    saved = hidden.new_empty((1, n), dtype=acc)
    cache = hidden.new_empty((cache_rows, weight.shape[0]))
    rows = hidden.new_empty((frozen_rows(stats), n, d) if frozen else (0,), dtype=acc)
    return out, saved, cache, rows


@torch.library.custom_op("prefkern::linear_logps_bwd", mutates_args=())
def _bwd(
    d_out: Tensor,  # [n, N]
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    out: Tensor,  # [n, N]
    saved: Tensor,  # [1, N]
    cache: Tensor,
    rows: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    stats: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    num_scored: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden [N, D], d_weight [V, D], d_bias [V]); [0] where not needed."""
    return shared.run(backend, "linear_logps_bwd",
        d_out.contiguous(), hidden, weight, targets, bias, out, saved, cache, rows, scale, softcap,
        temperature, ignore_index, tuple(stats.split(",")), need_hidden, need_weight, need_bias,
        num_scored,
    )  # fmt: skip


@_bwd.register_fake
def _(
    d_out, hidden, weight, targets, bias, out, saved, cache, rows, scale, softcap, temperature,
    ignore_index, stats, need_hidden, need_weight, need_bias, num_scored, backend,
):  # fmt: skip
    return head_gradients_like(hidden, weight, bias, need_hidden, need_weight, need_bias)


def head_gradients_like(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (d_hidden, d_weight, d_bias) in the shapes and dtypes the backward returns."""
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        torch.empty_like(cast(Tensor, bias)) if need_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, scale, softcap, temperature, ignore_index, stats = inputs[:9]
    ctx.num_scored, ctx.backend = inputs[11], inputs[12]
    ctx.options = (scale, softcap, temperature, ignore_index, stats)
    ctx.has_bias = bias is not None
    saved = (hidden, weight, targets, *output) + ((bias,) if ctx.has_bias else ())
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, *_):
    if d_out is None:
        return (None,) * 13
    hidden, weight, targets, out, saved, cache, rows, *rest = ctx.saved_tensors
    bias = rest[0] if ctx.has_bias else None
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    d_hidden, d_weight, d_bias = torch.ops.prefkern.linear_logps_bwd(
        d_out, hidden, weight, targets, bias, out, saved, cache, rows, *ctx.options,
        need_hidden, need_weight, need_bias, ctx.num_scored, ctx.backend,
    )  # fmt: skip
    grads = (
        d_hidden if need_hidden else None,
        d_weight if need_weight else None,
        None,
        d_bias if need_bias else None,
    )
    return grads + (None,) * 9


_fwd.register_autograd(_backward, setup_context=_setup_context)
shared.refuse_double_backward("prefkern::linear_logps_bwd")
