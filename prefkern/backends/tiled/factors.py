"""A frozen head: sums of weighted head rows, gathered in the forward (prefkern.backends.frozen)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tables
from .epilogue import Epilogue, Tile
from .operands import HeadTile, Operands
from .products import add_product
from .tiling import Step, Tiling, scratch, tile_view


class Factors:
    """The sums of one row block: totals [factors, m, D + r] relative to each row's maximum so far,
    which in the end is the one that the fold found."""

    def __init__(self, kernels: Epilogue, ops: Operands, plan: Tiling, totals: Tensor) -> None:
        self.kernels, self.ops, self.totals = kernels, ops, totals
        self.terms = scratch(plan, ops.call.working, ops.device)
        # a row of nothing but -inf so far has this maximum, so that -inf - max is no NaN
        lowest = torch.finfo(totals.dtype).min
        self.maxima = totals.new_full((2, totals.shape[1]), lowest)

    def add(self, tile: Tile, fields: Tensor, head: HeadTile) -> None:
        """After the fold of a tile: raises the maxima to those in its fields [F, C, m], moves the
        sums there and adds the tile's terms times its head rows."""
        call, old = self.ops.call, self.maxima
        new = old.clone()
        for row, name in zip(new, ("max", "ref_max") if call.ref else ("max",), strict=False):
            torch.maximum(row, fields[tables.FIELDS.index(name)].amax(0), out=row)
        first = tile.v0 == 0
        if not first:
            moves = torch.sub(old, new)
            self.kernels.raise_rows(call.plan.factors, self.totals, torch.cat([moves.exp(), moves]))
        self.maxima = new
        m, w = tile.x[0].shape
        terms = tile_view(self.terms, Step(0, m, 0, w))
        depth = head.weight.shape[1]
        for name, total in zip(call.plan.factors, self.totals, strict=True):
            self.kernels.factor(self.ops.sweep, tile, new, name, terms)
            add_product(terms, head.weight, total[:, :depth], fresh=first)
            if head.low_out is not None:
                add_product(terms, head.low_out, total[:, depth:], fresh=first)
