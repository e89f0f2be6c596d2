"""Eager twin of linear_divergence: full logits of policy and reference, then the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import SAVED_ROWS
from . import formulas
from .linear_logps import frozen_gradient, frozen_rows, head_gradients, sum_gradients
from .rows import Scored, logit_slope, product, rounded, scored_rows, shape_logits


def linear_divergence_fwd(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    ref_hidden: Tensor,  # [N, Dr]
    ref_weight: Tensor,  # [V, Dr]
    bias: Tensor | None,  # [V]
    ref_bias: Tensor | None,  # [V]
    aux_hidden: Tensor | None,  # [N, Da]
    aux_weight: Tensor | None,  # [V, Da]
    values: Tensor | None,  # [V], or [N, k] with values_index
    values_index: Tensor | None,  # [N, k]
    scale: float,
    ref_scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    temperature: float,
    ref_temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    cache_rows: int,
    frozen: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved = lse, ref_lse, aux_lse, 0 ..., cache [2, cache_rows, V], rows)."""
    n = hidden.shape[0]
    scored = scored_rows(targets, ignore_index, num_scored)
    options, ref_options = (scale, softcap, temperature), (ref_scale, ref_softcap, ref_temperature)
    x = product(scored.take(hidden), weight, exact=True)
    xr = product(scored.take(ref_hidden), ref_weight, exact=True)
    z, zr = shape_logits(x, bias, *options), shape_logits(xr, ref_bias, *ref_options)
    policy, ref, aux = formulas.model(z), formulas.model(zr), None
    if aux_hidden is not None:
        assert aux_weight is not None
        za = shape_logits(
            product(scored.take(aux_hidden), aux_weight, exact=True), None, *ref_options
        )
        aux = formulas.model(za)
    values, values_index = _values(scored, values, values_index)
    y = scored.take(targets).clamp(min=0)
    seen_later = shape_logits(rounded(xr, hidden.dtype), ref_bias, *ref_options)
    s = formulas.Inputs(y, policy, ref, aux, values, values_index, seen_later)
    out = torch.stack([formulas.value(stat, s) for stat in stats])

    saved = out.new_zeros((SAVED_ROWS, z.shape[0]))
    saved[0], saved[1] = policy.lse, ref.lse
    if aux is not None:
        saved[2] = aux.lse
    cache = hidden.new_empty((2, cache_rows, weight.shape[0]))
    kept = min(cache_rows, z.shape[0])
    cache[0, :kept], cache[1, :kept] = x[:kept].to(cache.dtype), xr[:kept].to(cache.dtype)
    rows = out.new_empty(0)
    if frozen:
        rows = frozen_rows(stats, s, out, logit_slope(z, *options), weight)
        rows = scored.put(rows, n, dim=1)
    return scored.put(out, n, dim=1), scored.put(saved, n, dim=1), cache, rows


def linear_divergence_bwd(
    d_out: Tensor,  # [n, N]
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
    out: Tensor,  # [n, N]
    saved: Tensor,  # [10, N]
    cache: Tensor,
    rows: Tensor,
    scale: float,
    ref_scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    temperature: float,
    ref_temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias) of the policy; [0] where not needed."""
    if rows.dim() == 3:
        return frozen_gradient(d_out, rows, stats, hidden), weight.new_empty(0), hidden.new_empty(0)
    scored = scored_rows(targets, ignore_index, num_scored)
    h, dtype = scored.take(hidden), hidden.dtype
    options, ref_options = (scale, softcap, temperature), (ref_scale, ref_softcap, ref_temperature)
    x = rounded(product(h, weight, exact=True), dtype)
    xr = rounded(product(scored.take(ref_hidden), ref_weight, exact=True), dtype)
    kept = min(cache.shape[1], x.shape[0])
    if scored.mask is None:  # else a forward outside this capture kept other rows
        x[:kept], xr[:kept] = cache[0, :kept].to(x.dtype), cache[1, :kept].to(x.dtype)
    z, zr = shape_logits(x, bias, *options), shape_logits(xr, ref_bias, *ref_options)
    policy, ref, aux = formulas.model(z), formulas.model(zr), None
    if aux_hidden is not None:
        assert aux_weight is not None
        xa = rounded(product(scored.take(aux_hidden), aux_weight, exact=True), dtype)
        aux = formulas.model(shape_logits(xa, None, *ref_options))
    values, values_index = _values(scored, values, values_index)
    s = formulas.Inputs(scored.take(targets).clamp(min=0), policy, ref, aux, values, values_index)
    dz = sum_gradients(d_out, scored, stats, s)
    dx = dz * logit_slope(z, *options)
    if scored.mask is not None:
        dx = torch.where(scored.mask[:, None], dx, 0.0)
    return head_gradients(dx, h, scored, hidden, weight, bias, need_hidden, need_weight, need_bias)


def _values(
    scored: Scored, values: Tensor | None, values_index: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Sparse values [N, k] of the scored rows; a [V] vector as it is."""
    if values_index is None:
        return values, None
    assert values is not None
    return scored.take(values), scored.take(values_index)
