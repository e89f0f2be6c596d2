"""Eager twin of linear_logps: full logits of the scored rows, then the formulas."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ...stats import NO_GRADIENT
from . import formulas
from .rows import Scored, fold_dtype, logit_slope, product, rounded, scored_rows, shape_logits

# Folded from fp32 logits: their value is a small difference of large sums.
NEEDS_EXACT = frozenset({"ent", "col"})


def linear_logps_fwd(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    cache_rows: int,
    frozen: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved [1, N] = lse, cache [cache_rows, V] = hidden W^T, rows [n', N, D])."""
    n = hidden.shape[0]
    scored = scored_rows(targets, ignore_index, num_scored)
    x = product(scored.take(hidden), weight, exact=bool(NEEDS_EXACT.intersection(stats)))
    z = shape_logits(x, bias, scale, softcap, temperature)
    s = formulas.Inputs(scored.take(targets).clamp(min=0), formulas.model(z))
    out = torch.stack([formulas.value(stat, s) for stat in stats])

    cache = hidden.new_empty((cache_rows, weight.shape[0]))
    cache[: min(cache_rows, x.shape[0])] = x[:cache_rows].to(cache.dtype)
    rows = out.new_empty(0)
    if frozen:
        slope = logit_slope(z, scale, softcap, temperature)
        rows = frozen_rows(stats, s, out, slope, weight)
        rows = scored.put(rows, n, dim=1)
    return scored.put(out, n, dim=1), scored.put(s.policy.lse[None], n, dim=1), cache, rows


def frozen_rows(
    stats: tuple[str, ...], s: formulas.Inputs, out: Tensor, slope: Tensor | float, weight: Tensor
) -> Tensor:
    """sum_v (d stat / dx_v) W_v for each differentiable statistic [n', M, D], fp32."""
    ones = torch.ones_like(s.policy.lse)
    head = weight.to(out.dtype)
    rows = [
        (cast(Tensor, formulas.logit_gradient(stat, ones, s, out[i])) * slope) @ head
        for i, stat in enumerate(stats)
        if formulas.split(stat)[0] not in NO_GRADIENT
    ]
    return torch.stack(rows) if rows else out.new_empty((0, ones.numel(), weight.shape[1]))


def linear_logps_bwd(
    d_out: Tensor,  # [n, N]
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    out: Tensor,  # [n, N]
    saved: Tensor,  # [1, N]
    cache: Tensor,
    rows: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias); [0] where not needed."""
    if rows.dim() == 3:
        return frozen_gradient(d_out, rows, stats, hidden), weight.new_empty(0), hidden.new_empty(0)
    scored = scored_rows(targets, ignore_index, num_scored)
    h = scored.take(hidden)
    x = product(h, weight, exact=bool(NEEDS_EXACT.intersection(stats)))
    x = rounded(x, hidden.dtype)
    if scored.mask is None:  # else a forward outside this capture kept other rows
        x[: cache.shape[0]] = cache[: x.shape[0]].to(x.dtype)
    z = shape_logits(x, bias, scale, softcap, temperature)
    s = formulas.Inputs(scored.take(targets).clamp(min=0), formulas.model(z))
    dz = sum_gradients(d_out, scored, stats, s)
    dx = dz * logit_slope(z, scale, softcap, temperature)
    if scored.mask is not None:
        dx = torch.where(scored.mask[:, None], dx, 0.0)
    return head_gradients(dx, h, scored, hidden, weight, bias, need_hidden, need_weight, need_bias)


def sum_gradients(
    d_out: Tensor, scored: Scored, stats: tuple[str, ...], s: formulas.Inputs
) -> Tensor:
    """dL/dz [M, V]: the sum over statistics of the upstream number times the statistic's gradient.

    Normalisers and values are those of the logits in `s`, which a 16-bit working dtype has rounded:
    the forward's would leave an error of eps |z| p in every entry.
    """
    dz = torch.zeros_like(s.policy.z)
    for i, stat in enumerate(stats):
        c = d_out[i].to(dz.dtype).index_select(0, scored.index)
        part = formulas.logit_gradient(stat, c, s, formulas.value(stat, s))
        if part is not None:
            dz += part
    return dz


def frozen_gradient(d_out: Tensor, rows: Tensor, stats: tuple[str, ...], hidden: Tensor) -> Tensor:
    """sum_s d_out[s] rows[s] [N, D], in hidden's dtype."""
    grad = [i for i, stat in enumerate(stats) if formulas.split(stat)[0] not in NO_GRADIENT]
    return torch.einsum("sn,snd->nd", d_out[grad].to(rows.dtype), rows).to(hidden.dtype)


def head_gradients(
    dx: Tensor,  # [M, V] fp32
    h: Tensor,  # [M, D]
    scored,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward products: operands rounded to the working dtype, sums in fp32, cast once."""
    acc = fold_dtype(hidden.dtype)
    dx = dx.to(hidden.dtype).to(acc)
    d_hidden, d_weight, d_bias = hidden.new_empty(0), weight.new_empty(0), hidden.new_empty(0)
    if need_hidden:
        full = dx @ weight.to(hidden.dtype).to(acc)
        d_hidden = scored.put(full, hidden.shape[0]).to(hidden.dtype)
    if need_weight:
        d_weight = (dx.T @ h.to(acc)).to(weight.dtype)
    if need_bias:
        assert bias is not None
        d_bias = dx.sum(0).to(bias.dtype)
    return d_hidden, d_weight, d_bias
