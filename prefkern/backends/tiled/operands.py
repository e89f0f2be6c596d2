"""What both directions of a call work on: the computed rows of every model, the head tile by tile,
given values tile by tile."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import memory
from ..contract import HeadCall, Model
from .epilogue import LogitOptions, ProductTile, Sweep
from .tiling import TileRange, Tiling, given_tiling, make_tiling, stride_of


class ModelRows(NamedTuple):
    """One model, and its computed rows (none where logits are given)."""

    model: Model
    hidden: Tensor | None  # [M, D]
    low_in: Tensor | None  # [M, r]


class HeadTile(NamedTuple):
    """Some rows of a head in the working dtype."""

    weight: Tensor  # [w, D]
    low_out: Tensor | None  # [w, r]


class Operands(NamedTuple):
    """The computed rows of a call."""

    sweep: Sweep
    models: tuple[ModelRows, ...]
    values: Tensor | None  # [V] fold dtype, or [M, k] with columns
    columns: Tensor | None  # [M, k] int64
    by_tile: bool  # kernels read the values; else `taught` alone does

    @property
    def call(self) -> HeadCall:
        return self.sweep.call

    @property
    def device(self) -> torch.device:
        return self.sweep.targets.device

    @property
    def m(self) -> int:
        """Rows at hand."""
        return self.sweep.targets.shape[0]

    def take(self, rows: Tensor) -> Operands:
        """Some of the rows."""

        def some(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, rows)

        models = tuple(ModelRows(one.model, some(one.hidden), some(one.low_in))
                       for one in self.models)  # fmt: skip
        sweep = replace(self.sweep, targets=self.sweep.targets.index_select(0, rows))
        values = self.values if self.columns is None else some(self.values)
        return self._replace(sweep=sweep, models=models, values=values, columns=some(self.columns))

    def plan(self, chunk: int, *, even: bool = True) -> Tiling:
        """Blocks and tiles; the same in every direction, so that all make the same products."""
        call, limit = self.call, memory.tile_bytes(self.device)
        if call.given:
            return given_tiling(self.m, call.V, self.sweep.fields, chunk, limit)
        size = tile_itemsize(self.sweep)
        return make_tiling(self.m, call.V, size, chunk, limit, even=even)

    @property
    def depth(self) -> int:
        """D + r of the policy."""
        one = self.models[0]
        sizes = [x.shape[1] for x in (one.hidden, one.low_in) if x is not None]
        return sum(sizes)

    def heads(self, v0: int, v1: int) -> list[HeadTile]:
        """Of each model; models that share a head share the tile."""
        made: dict[tuple[int, tuple[int, ...]], Tensor] = {}

        def rows(x: Tensor) -> Tensor:
            key = (x.data_ptr(), tuple(x.shape))
            if key not in made:
                made[key] = x[v0:v1].to(self.call.working)
            return made[key]

        found = []
        for one in self.models:
            if one.model.weight is not None:
                low = None if one.model.low_out is None else rows(one.model.low_out)
                found.append(HeadTile(rows(one.model.weight), low))
        return found

    def tile(self, step: TileRange, products: list[Tensor]) -> ProductTile:
        return ProductTile(step.r0, step.v0, tuple(products), self._advantage(step))

    def _advantage(self, step: TileRange) -> Tensor | None:
        """Given values on one tile: [w], or [m, w] from sparse ones."""
        if self.values is None or not self.by_tile:
            return None
        if self.columns is None:
            return self.values[step.v0 : step.v1]
        local = self.columns[step.r0 : step.r1] - step.v0
        outside = (local < 0) | (local >= step.w)
        dense = self.values.new_zeros((step.m, stride_of(step.w + 1)))
        # one more column takes what is outside
        dense.scatter_(1, local.masked_fill(outside, step.w), self.values[step.r0 : step.r1])
        return dense[:, : step.w]

    def taught(self, step: TileRange, x: Tensor) -> Tensor:  # [m] float64
        """This tile's part of sum_k q_k z_k; x: the policy's products."""
        assert self.values is not None and self.columns is not None
        local = self.columns[step.r0 : step.r1] - step.v0
        here = (local >= 0) & (local < step.w)
        local = torch.where(here, local, 0)
        option, q = self.sweep.options[0], self.values[step.r0 : step.r1]
        raw = x.gather(1, local).to(q.dtype)
        if option.bias is not None:
            raw = raw + option.bias[step.v0 : step.v1].take(local)
        z = option.capped(raw * option.factor)
        return torch.where(here & (q != 0), q * z, 0.0).sum(1, dtype=torch.float64)

    def put(self, x: Tensor) -> Tensor:
        """[M, ...] back to [N, ...] in the working dtype, exactly 0 in rows that do not count."""
        call = self.call
        x = x.to(call.working)
        if call.rows is None or call.M == call.N:
            return x
        return x.new_zeros((call.N, *x.shape[1:])).index_copy_(0, call.rows, x)


def tile_itemsize(sweep: Sweep) -> int:
    """Bytes of a logit in all tiles that live at once."""
    call = sweep.call
    size = len(call.models) * sweep.tile_dtype.itemsize
    if call.wide or call.plan.frozen:  # dx or a frozen head's terms lie in a tile of their own
        size += call.working.itemsize
    if call.values_index is not None:
        size += call.fold_dtype.itemsize
    return size


def gather(call: HeadCall, *, backward: bool = False) -> Operands:
    """Computed rows of every operand; for a backward, of those that its gradient reads."""
    acc = call.fold_dtype
    # all rows in their order, where all are scored
    whole = call.rows is None or call.M == call.N

    def take(x: Tensor) -> Tensor:
        return x if whole or call.rows is None else x.index_select(0, call.rows)

    targets = take(call.targets)
    sweep = Sweep(call, targets, tuple(LogitOptions.of(m, acc) for m in call.models))
    models = []
    for model in call.models[: sweep.backward_models if backward else None]:
        parts = [None if x is None else take(x) for x in (model.hidden, model.low_in)]
        if backward and call.rows is None and model is call.policy:
            # dx is 0 in rows that do not count, and 0 times what they hold may be NaN
            live = (targets != call.ignore_index)[:, None]
            parts = [None if x is None else torch.where(live, x, 0.0) for x in parts]
        models.append(ModelRows(model, *parts))
    values = columns = None
    by_tile = backward or call.plan.ev == "values"
    if _reads_values(call, backward):
        assert call.values is not None
        values = call.values.to(acc)
        if call.values_index is not None:
            values, columns = _sparse(take(values), take(call.values_index), call.V)
            if by_tile:
                values = _distinct(values, columns)
    return Operands(sweep, tuple(models), values, columns, by_tile)


def _reads_values(call: HeadCall, backward: bool) -> bool:
    if call.values is None:
        return False
    name = "xent" if call.plan.has("xent") else "ev"
    return call.plan.grows(name) if backward else call.plan.has(name)


def _sparse(values: Tensor, columns: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """An entry that no column has makes its row NaN: a device that is not read cannot refuse it."""
    bad = (columns < 0) | (columns >= vocabulary)
    return torch.where(bad, torch.nan, values), torch.where(bad, 0, columns)


def _distinct(values: Tensor, columns: Tensor) -> Tensor:
    """values [M, k] where entries that name the same column each hold the sum of all of them: a
    scatter then writes equal numbers, in whatever order."""
    step = max(1, (1 << 24) // max(1, columns.shape[1] ** 2))
    parts = [
        torch.where(c[:, :, None] == c[:, None, :], v[:, None, :], 0.0).sum(2)
        for c, v in zip(columns.split(step), values.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else values
