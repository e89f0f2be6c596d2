"""linear_divergence: policy and reference in one sweep over the vocabulary.

Shapes: N tokens, V vocabulary, D hidden size of the policy, Dr of the reference, n statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..backends.contract import SAVED_ROWS
from ..head import Head, HeadLike, as_head
from ..stats import ONE_MODEL_STATS, TWO_MODEL_STATS, Stat, TokenStats, parse_stats
from . import budget, shared
from .linear_logps import frozen_head, frozen_rows, head_gradients_like, needs_gradient


def linear_divergence(
    hidden: Tensor,  # [N, D] or [B, T, D]
    head: HeadLike,  # [V, D]
    targets: Tensor,  # [N] or [B, T] int64
    ref_hidden: Tensor,  # [N, Dr] or [B, T, Dr]
    ref_head: HeadLike | None = None,  # [V, Dr]
    *,
    aux_hidden: Tensor | None = None,  # [N, Da] or [B, T, Da]
    aux_head: HeadLike | None = None,  # [V, Da]
    values: Tensor | tuple[Tensor, Tensor] | None = None,  # [V], or (index, value) each [N, k]
    ignore_index: int = -100,
    stats: str | Sequence[str] = ("logp", "ref_logp", "fkl"),
    num_scored: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Per-token statistics of the policy p and the reference r without holding [N, V] logits.

    p = softmax(z), r = softmax(z_ref); z as in `linear_logps`. The reference is a constant.

    Args:
        hidden, head, targets, ignore_index, num_scored, memory_budget, backend: As in
            `linear_logps`.
        ref_hidden: Hidden states of the reference for the same tokens `[N, Dr]` or `[B, T, Dr]`.
        ref_head: Head of the reference, with its own bias, scale, soft cap and temperature. Default
            None: the policy's head, read as a constant.
        aux_hidden, aux_head: A third head for the statistic `ev`:
            A_v = log softmax(aux)_v - log r_v, formed in the tile. Its scale, soft cap and
            temperature must be the reference's.
        values: A for `ev`: one number per vocabulary entry `[V]`, or a pair (index, value) of
            `[N, k]` tensors holding the non-zero entries of each row.
        stats: Any of `linear_logps`' names and ref_logp, ref_lse, fkl = KL(r||p), rkl = KL(p||r),
            "jsd:b", "alpha:a", "renyi:a", tv, "bkl:k", "mix:b", ev. One parameter per field and
            call. Default ("logp", "ref_logp", "fkl").

    Returns:
        TokenStats; each requested field has the shape of `targets`, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: as `linear_logps`; a reference, aux or values input that requires grad; `ev`
            without exactly one source of A; a dense [N, V] `values`.

    Source: TDPO (Zeng et al. 2024) for fkl; GKD (Agarwal et al. 2024) for jsd; ADPA for ev.
    """
    checks.check_integer_targets("targets", targets)
    head = as_head(head)
    weight, bias = head.weight, head.bias
    checks.check_head(hidden, weight, targets, bias)
    parsed = parse_stats(stats, allowed=ONE_MODEL_STATS + TWO_MODEL_STATS)
    ref = head.detach() if ref_head is None else as_head(ref_head, "ref_head")
    budget.check_budget(memory_budget)
    _check_reference(hidden, weight, targets, ref_hidden, ref.weight, ref.bias)
    values, values_index = _check_values(targets, weight.shape[0], values)
    aux_weight = _aux_weight(aux_head, ref)
    _check_ev(parsed, hidden, weight, targets, aux_hidden, aux_weight, values)

    dtype = shared.compute_dtype(hidden)
    rows = shared.rows_of(hidden, dtype)
    v = weight.shape[0]
    names = ",".join(str(s) for s in parsed)
    chosen = shared.resolve(
        "linear_divergence", hidden.device.type, dtype, weight.dtype, names, backend,
        shared.shape_for_message(rows.shape[0], v, weight.shape[1]),
    )  # fmt: skip
    frozen = frozen_head(hidden, weight, bias, parsed)
    scored = budget.count_scored(targets, ignore_index, num_scored)
    kept = 0
    if not frozen and needs_gradient(hidden, weight, bias):
        kept = budget.rows_kept(scored, v, 2 * dtype.itemsize, memory_budget, hidden.device)
    out, _, _, _ = torch.ops.prefkern.linear_divergence_fwd(
        rows, weight.contiguous(), targets.reshape(-1).long().contiguous(),
        shared.rows_of(ref_hidden, dtype), ref.weight.contiguous(), _contiguous(bias),
        _contiguous(ref.bias),
        None if aux_hidden is None else shared.rows_of(aux_hidden, dtype), _contiguous(aux_weight),
        _contiguous(values), _contiguous(values_index),
        float(head.scale), float(ref.scale), _float(head.softcap), _float(ref.softcap),
        float(head.temperature), float(ref.temperature), ignore_index, names, kept, frozen,
        num_scored, chosen,
    )  # fmt: skip
    return shared.to_token_stats(out, parsed, targets.shape)


def _aux_weight(aux_head: HeadLike | None, ref: Head) -> Tensor | None:
    """The third head's weight: it is read with the reference's scale, soft cap and temperature."""
    if aux_head is None:
        return None
    aux = as_head(aux_head, "aux_head")
    own = (aux.scale, aux.softcap, aux.temperature)
    if isinstance(aux_head, Head) and own != (ref.scale, ref.softcap, ref.temperature):
        raise ValueError(
            "aux_head must have the reference's scale, softcap and temperature, got "
            f"{own} and {(ref.scale, ref.softcap, ref.temperature)}."
        )
    if aux.bias is not None:
        raise ValueError("aux_head must have no bias, got one.")
    return aux.weight


def _float(x: float | None) -> float | None:
    return None if x is None else float(x)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _check_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
) -> None:
    checks.check_head(ref_hidden, ref_weight, targets, ref_bias, prefix="ref_")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_head must have the policy's vocabulary V = {weight.shape[0]}, got "
            f"{checks.shape_text(ref_weight)}; pad the smaller head and mark the padding with a "
            "bias of -inf."
        )
    checks.check_same_device("ref_hidden", ref_hidden, "hidden", hidden)
    for name, tensor in (
        ("ref_hidden", ref_hidden),
        ("ref_head: weight", ref_weight),
        ("ref_head: bias", ref_bias),
    ):
        checks.check_constant(name, tensor)


def _check_values(
    targets: Tensor, vocabulary: int, values: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor | None]:
    """values -> (values [V] or [N, k], index [N, k] or None)."""
    if values is None:
        return None, None
    if isinstance(values, tuple):
        index, value = values
        index = checks.check_integer_targets("values[0] (index)", index)
        value = checks.check_float("values[1] (value)", value)
        if index.shape != value.shape or tuple(index.shape[:-1]) != tuple(targets.shape):
            raise ValueError(
                f"sparse values must be (index, value), both {list(targets.shape)} + [k], got "
                f"{checks.shape_text(index)} and {checks.shape_text(value)}."
            )
        checks.check_constant("values", value)
        checks.check_same_device("values[0] (index)", index, "targets", targets)
        checks.check_same_device("values[1] (value)", value, "targets", targets)
        k = index.shape[-1]
        return value.reshape(-1, k), index.reshape(-1, k).long()
    checks.check_float("values", values)
    checks.check_constant("values", values)
    checks.check_same_device("values", values, "targets", targets)
    if tuple(values.shape) != (vocabulary,):
        raise ValueError(
            f"values must be [V] = [{vocabulary}] or a sparse pair (index, value) of [N, k] "
            "tensors, got "
            f"{checks.shape_text(values)}; a dense [N, V] is what this op exists to avoid: pass "
            "the "
            "top entries of each row, or the head they come from (aux_hidden, aux_head)."
        )
    return values, None


def _check_ev(
    parsed: tuple[Stat, ...], hidden: Tensor, weight: Tensor, targets: Tensor,
    aux_hidden: Tensor | None, aux_weight: Tensor | None, values: Tensor | None,
) -> None:  # fmt: skip
    wanted = any(s.name == "ev" for s in parsed)
    if (aux_hidden is None) != (aux_weight is None):
        raise ValueError(
            "aux_hidden and aux_head must be given together, got only one; pass both or none."
        )
    if aux_hidden is not None:
        assert aux_weight is not None
        checks.check_head(aux_hidden, aux_weight, targets, None, prefix="aux_")
        if aux_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"aux_head must have the policy's vocabulary V = {weight.shape[0]}, got "
                f"{checks.shape_text(aux_weight)}."
            )
        checks.check_same_device("aux_hidden", aux_hidden, "hidden", hidden)
        checks.check_constant("aux_hidden", aux_hidden)
        checks.check_constant("aux_head: weight", aux_weight)
    sources = (aux_hidden is not None) + (values is not None)
    if wanted and sources != 1:
        raise ValueError(
            f"the statistic 'ev' needs exactly one source of A, got {sources}; pass values=[V], "
            "values=(index, value), or aux_hidden and aux_head."
        )
    if not wanted and sources:
        raise ValueError(
            "values and aux_* serve the statistic 'ev' only; add 'ev' to stats or drop them."
        )


@torch.library.custom_op("prefkern::linear_divergence_fwd", mutates_args=())
def _fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    aux_hidden: Tensor | None,
    aux_weight: Tensor | None,
    values: Tensor | None,
    values_index: Tensor | None,
    scale: float,
    ref_scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    temperature: float,
    ref_temperature: float,
    ignore_index: int,
    stats: str,
    cache_rows: int,
    frozen: bool,
    num_scored: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved [10, N], cache [2, cache_rows, V] or [0], rows [n', N, D] or [0])."""
    if targets.device.type == "cpu":
        checks.check_target_range(targets, weight.shape[0], ignore_index)
        checks.check_num_scored(targets, ignore_index, num_scored)
        if values_index is not None:
            checks.check_index_range(values_index[targets != ignore_index], weight.shape[0])
    return shared.run(backend, "linear_divergence_fwd",
        hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias, aux_hidden,
        aux_weight, values,
        values_index, scale, ref_scale, softcap, ref_softcap, temperature, ref_temperature,
        ignore_index, tuple(stats.split(",")), cache_rows, frozen, num_scored,
    )  # fmt: skip


@_fwd.register_fake
def _(hidden, weight, *args):
    stats, cache_rows, frozen = args[-5], args[-4], args[-3]
    n, d = hidden.shape
    acc = shared.stat_dtype(hidden.dtype)
    out = hidden.new_empty((len(stats.split(",")), n), dtype=acc)
    saved = hidden.new_empty((SAVED_ROWS, n), dtype=acc)
    cache = hidden.new_empty((2, cache_rows, weight.shape[0]))
    rows = hidden.new_empty((frozen_rows(stats), n, d) if frozen else (0,), dtype=acc)
    return out, saved, cache, rows


@torch.library.custom_op("prefkern::linear_divergence_bwd", mutates_args=())
def _bwd(
    d_out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    aux_hidden: Tensor | None,
    aux_weight: Tensor | None,
    values: Tensor | None,
    values_index: Tensor | None,
    out: Tensor,
    saved: Tensor,
    cache: Tensor,
    rows: Tensor,
    scale: float,
    ref_scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    temperature: float,
    ref_temperature: float,
    ignore_index: int,
    stats: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    num_scored: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias) of the policy; [0] where not needed."""
    return shared.run(backend, "linear_divergence_bwd",
        d_out.contiguous(), hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias,
        aux_hidden,
        aux_weight, values, values_index, out, saved, cache, rows, scale, ref_scale, softcap,
        ref_softcap, temperature, ref_temperature, ignore_index, tuple(stats.split(",")),
        need_hidden, need_weight, need_bias, num_scored,
    )  # fmt: skip


@_bwd.register_fake
def _(d_out, hidden, weight, targets, ref_hidden, ref_weight, bias, *args):
    need_hidden, need_weight, need_bias = args[-5:-2]
    return head_gradients_like(hidden, weight, bias, need_hidden, need_weight, need_bias)


TENSOR_INPUTS = 11  # hidden ... values_index


def _setup_context(ctx, inputs, output) -> None:
    tensors = inputs[:TENSOR_INPUTS]
    ctx.present = [t is not None for t in tensors]
    ctx.options = inputs[TENSOR_INPUTS:19]
    ctx.num_scored, ctx.backend = inputs[21], inputs[22]
    ctx.save_for_backward(*output, *(t for t in tensors if t is not None))
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, *_):
    grads: list[Tensor | None] = [None] * 23
    if d_out is None:
        return tuple(grads)
    out, saved, cache, rows, *present = ctx.saved_tensors
    stream = iter(present)
    tensors = [next(stream) if here else None for here in ctx.present]
    need_hidden, need_weight, need_bias = (ctx.needs_input_grad[i] for i in (0, 1, 5))
    d_hidden, d_weight, d_bias = torch.ops.prefkern.linear_divergence_bwd(
        d_out, *tensors, out, saved, cache, rows, *ctx.options, need_hidden, need_weight, need_bias,
        ctx.num_scored, ctx.backend,
    )  # fmt: skip
    grads[0] = d_hidden if need_hidden else None
    grads[1] = d_weight if need_weight else None
    grads[5] = d_bias if need_bias else None
    return tuple(grads)


_fwd.register_autograd(_backward, setup_context=_setup_context)
shared.refuse_double_backward("prefkern::linear_divergence_bwd")
