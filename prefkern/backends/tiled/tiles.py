"""The raw products of one tile: kept ones where there are, else made, or views of given logits."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .operands import HeadTile, ModelRows, Operands
from .products import add_product, product
from .tiling import Kept, TileRange, Tiling, scratch, tile_view

DX = -1  # the scratch tile of a gradient that cannot lie over the policy's products


class Products:
    """Of the models of `ops`. A scratch tile is made when it is first needed: there is none where
    all tiles are kept."""

    def __init__(self, ops: Operands, plan: Tiling, cache: Tensor) -> None:
        self.ops, self.plan = ops, plan
        self.kept = Kept(plan, ops.call.kept_models, cache.view(-1))
        self.scratch: dict[int, Tensor] = {}

    def of(self, ops: Operands) -> Products:
        """The same scratch for other rows, of tiles no larger."""
        made = copy.copy(self)
        made.ops = ops
        return made

    def make(
        self, step: TileRange, heads: list[HeadTile], places: list[Tensor], *, filled: bool = False
    ) -> list[Tensor]:
        """[m, w] of every model; those of the first lie in `places`, already there if `filled`."""
        if self.ops.call.given:
            given = (one.model.logits for one in self.ops.models)
            return [x[step.r0 : step.r1] for x in given if x is not None]
        made = []
        for i, one in enumerate(self.ops.models):
            here = i < len(places)
            out = places[i] if here else self.room(i, step, self.ops.sweep.tile_dtype)
            if not (here and filled):
                _multiply(one, heads[i], step, out)
            made.append(out)
        return made

    def room(self, i: int, step: TileRange, dtype: torch.dtype) -> Tensor:
        """A scratch tile, the same one for all steps."""
        if i not in self.scratch:
            self.scratch[i] = scratch(self.plan, dtype, self.ops.device)
        return tile_view(self.scratch[i], step)


def _multiply(one: ModelRows, head: HeadTile, step: TileRange, out: Tensor) -> None:
    """Low-rank terms come first: where tiles have 16 bits, what is rounded twice is the smaller
    part of the sum."""
    assert one.hidden is not None
    rows = slice(step.r0, step.r1)
    if one.low_in is None or head.low_out is None:
        product(one.hidden[rows], head.weight.T, out)
    else:
        product(one.low_in[rows], head.low_out.T, out)
        add_product(one.hidden[rows], head.weight.T, out)
