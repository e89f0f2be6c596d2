"""Rows of a call, and how the eager backend makes its logits.

Shapes: N rows, M computed rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import HeadCall, Model
from .finish import targets_of


class Logits(NamedTuple):
    """Products of one model and what became of them."""

    x: Tensor  # [M, V] raw products, fold dtype
    z: Tensor  # [M, V] logits


def own_rows(call: HeadCall) -> Tensor | None:
    """Rows that count, found here where none were given and reading targets waits for nobody."""
    if call.rows is not None or call.given or call.targets.device.type != "cpu":
        return None
    return (call.targets != call.ignore_index).nonzero().flatten()


def spread_rows(call: HeadCall, rows: Tensor, x: Tensor) -> Tensor:
    """[k, M, ...] back to [k, N, ...]; an empty x stays empty."""
    if x.dim() < 2:
        return x
    return x.new_zeros((x.shape[0], call.N, *x.shape[2:])).index_copy_(1, rows, x)


def take_rows(call: HeadCall, x: Tensor) -> Tensor:
    """Computed rows [M, ...]; rows that do not count become 0, so that NaN or inf in them cannot
    spread."""
    if call.rows is not None:
        return x.index_select(0, call.rows)
    live = targets_of(call)[1].reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(live, x, torch.zeros_like(x))


def put_rows(call: HeadCall, x: Tensor) -> Tensor:
    """[M, ...] back to [N, ...], exactly 0 in rows that were not computed or do not count."""
    if call.rows is not None:
        return x.new_zeros((call.N, *x.shape[1:])).index_copy_(0, call.rows, x)
    live = targets_of(call)[1].reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(live, x, torch.zeros_like(x))


def logits_of(call: HeadCall, model: Model, *, rounded: bool) -> Logits:
    """Raw products and logits [M, V]. rounded: products in the working dtype; else 16-bit operands
    are multiplied in fp32."""
    acc = call.fold_dtype
    if model.logits is not None:
        x = take_rows(call, model.logits).to(acc)
        return Logits(x, shape(x, model))
    assert model.hidden is not None and model.weight is not None
    pairs = [(take_rows(call, model.hidden), model.weight)]
    if model.low_in is not None and model.low_out is not None:
        pairs.append((take_rows(call, model.low_in), model.low_out))
    x = functools.reduce(Tensor.add, (a.to(acc) @ b.to(call.working).to(acc).T for a, b in pairs))
    if rounded:
        x = round_to(x, call.working)
    return Logits(x, shape(x, model))


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the working dtype, before bias, scale and cap: the slope of a cap near saturation
    would not survive rounding after it."""
    return x.to(dtype).to(x.dtype)


def shape(x: Tensor, model: Model) -> Tensor:
    """softcap * tanh(scale * (x + bias) / softcap) / temperature."""
    if model.bias is not None:
        x = x + model.bias.to(x.dtype)
    if model.softcap == 0.0:
        return x * (model.scale / model.temperature)
    cap = model.softcap
    return cap / model.temperature * torch.tanh(x * (model.scale / cap))


def slope_of(z: Tensor, model: Model) -> Tensor | float:
    """The variable part of dz/dx."""
    if model.softcap == 0.0:
        return 1.0
    return 1.0 - (z * (model.temperature / model.softcap)) ** 2


def blend(x: Tensor, xr: Tensor, a: float) -> Tensor:
    """x + a (xr - x), -inf wherever a term with weight is -inf."""
    if a == 0 or a == 1:
        return x if a == 0 else xr
    u = x + a * (xr - x)
    return torch.where(u == u, u, -math.inf)


def advantage(call: HeadCall, columns: slice, like: Tensor) -> Tensor:
    """Given A of ev on some columns: [w], or [M, w] from sparse values."""
    assert call.values is not None
    if call.values_index is None:
        return call.values[columns].to(like.dtype)
    values, index = take_rows(call, call.values).to(like.dtype), take_rows(call, call.values_index)
    width = columns.stop - columns.start
    inside = (index >= columns.start) & (index < columns.stop)
    dense = like.new_zeros((like.shape[0], width))
    local = torch.where(inside, index - columns.start, 0)
    return dense.scatter_add(1, local, torch.where(inside, values, 0.0))


def in_top(zr: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """[M, V] bool; value and index [M, 1]."""
    columns = torch.arange(zr.shape[1], device=zr.device)
    return (zr > value) | ((zr == value) & (columns <= index))
