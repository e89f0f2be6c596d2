"""A frozen head: sums of weighted head rows, gathered in the forward (prefkern.backends.frozen)."""

from __future__ import annotations

import torch
from torch import Tensor

from .epilogue import Epilogue, FrozenSums, ProductTile
from .operands import HeadTile, Operands
from .products import add_product
from .tiling import TileRange, Tiling, scratch, tile_view


class Factors:
    """The sums of one row block: totals [factors, m, D + r] relative to each row's maximum so far,
    which in the end is the one that the fold found."""

    def __init__(self, kernels: Epilogue, ops: Operands, plan: Tiling, totals: Tensor) -> None:
        self.kernels, self.ops, self.totals = kernels, ops, totals
        self.terms = scratch(plan, ops.call.working, ops.device)
        # a row of nothing but -inf so far has this maximum, so that -inf - max is no NaN
        lowest = torch.finfo(totals.dtype).min
        self.maxima = totals.new_full((2, totals.shape[1]), lowest)

    def fold(self, tile: ProductTile, fields: Tensor, at: Tensor, head: HeadTile) -> None:
        """The fold of a tile (fields [F, C, m]), and its terms times its head rows added."""
        sweep, names, first = self.ops.sweep, self.ops.call.plan.factors, tile.v0 == 0
        sums = FrozenSums(names, self.totals, self.maxima, started=not first)
        m, w = tile.x[0].shape
        terms = tile_view(self.terms, TileRange(0, m, 0, w))
        self.kernels.fold_frozen(sweep, tile, fields, at, sums, terms)
        depth = head.weight.shape[1]
        for name, total in zip(names, self.totals, strict=True):
            if name != "mass":
                self.kernels.factor(sweep, tile, self.maxima, name, terms)
            add_product(terms, head.weight, total[:, :depth], fresh=first)
            if head.low_out is not None:
                add_product(terms, head.low_out, total[:, depth:], fresh=first)
