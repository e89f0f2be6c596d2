"""Both sweeps of a forward: for each block of rows and range of columns, products and one fold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import tables
from ..contract import Folded, HeadCall
from .epilogue import Epilogue, ProductTile
from .factors import Factors
from .operands import HeadTile, Operands, gather
from .products import full_precision
from .tiles import Products
from .tiling import TileRange, Tiling
from .topset import TopSet

# Chunk sums merged at a time: where the arithmetic is eager, float64 copies of them stay below
# 0.3 GB.
MERGED = 1 << 24


def fold(kernels: Epilogue, call: HeadCall, kept: int) -> Folded:
    """The first sweep (prefkern.backends.contract.Backend)."""
    ops = gather(call)
    cache = call.targets.new_empty((call.kept_models, kept, call.V), dtype=call.cache_dtype)
    with full_precision(ops.device):
        return _Fold(kernels, ops, cache).run()


def fold_again(kernels: Epilogue, call: HeadCall, norms: Tensor, cache: Tensor) -> Tensor:
    """The second sweep. Tiles that were kept unrounded are the first sweep's, bit for bit."""
    ops = gather(call)
    out = norms.new_zeros((len(tables.SECOND), call.M), dtype=torch.float64)
    with full_precision(ops.device):
        chunk = kernels.chunk_columns(ops.sweep)
        plan = ops.plan(chunk)
        products = Products(ops, plan, cache)
        for block in plan.blocks():
            shape = (len(tables.SECOND), -(-call.V // chunk), block.stop - block.start)
            fields = norms.new_empty(shape)
            for step, heads in steps(ops, plan, block):
                places = [] if ops.sweep.rounded else products.kept.place(step)
                made = products.make(step, heads, places, filled=True)
                tile = ProductTile(step.r0, step.v0, tuple(made[:2]))
                kernels.fold_again(ops.sweep, tile, norms[:, block], _part(fields, step, chunk))
            out[:, block] = fields.sum(1, dtype=torch.float64)
    return out


def steps(ops: Operands, plan: Tiling, block: slice) -> Iterator[tuple[TileRange, list[HeadTile]]]:
    """Every tile of a block of rows, with the head's rows of its columns; none of no rows."""
    for v0 in plan.tiles() if block.stop > block.start else ():
        v1 = min(v0 + plan.columns, plan.V)
        yield TileRange(block.start, block.stop, v0, v1), ops.heads(v0, v1)


def _part(fields: Tensor, step: TileRange, chunk: int) -> Tensor:
    """Fields of the chunks of one step."""
    first = step.v0 // chunk
    return fields[:, first : first + -(-step.w // chunk)]


class _Fold:
    """Row blocks one after the other: the chunk fields of all rows at once would be 0.4 GB for a KL
    of 65,536 rows over 152k entries. A block reads the head once, as its products do anyway."""

    def __init__(self, kernels: Epilogue, ops: Operands, cache: Tensor) -> None:
        self.kernels, self.ops, self.call, self.sweep = kernels, ops, ops.call, ops.sweep
        self.chunk = kernels.chunk_columns(ops.sweep)
        self.plan = ops.plan(self.chunk)
        self.cache = cache
        self.products = Products(ops, self.plan, cache)
        self.starts = torch.arange(0, self.call.V, self.chunk, device=ops.device)

    def run(self) -> Folded:
        call, m, device = self.call, self.call.M, self.ops.device
        self.at = torch.zeros((len(tables.AT), m), dtype=torch.float64, device=device)
        size: tuple[int, ...] = (0,)
        if call.plan.frozen:
            size = (len(call.plan.factors), m, self.ops.depth)
        self.factors = torch.empty(size, dtype=call.fold_dtype, device=device)
        tops, sums, masses = [], [], []
        for block in self.plan.blocks():
            top = None
            if call.plan.has("bkl"):
                k = min(int(call.plan.param("bkl")), call.V)
                top = TopSet(block.stop - block.start, k, call.fold_dtype, device)
            fields = self.block(block, top)
            sums.append(self.merge(fields))
            if top is not None:
                tops.append(top.members)
            if call.plan.tail > 0.0:
                masses.append(self.masses(fields))
        self.products.kept.clear_rest()
        merged = sums[0] if len(sums) == 1 else torch.cat(sums, 1)
        top_all, chunks = (torch.cat(x, 2) if x else None for x in (tops, masses))
        return Folded(
            merged, self.at, self.cache, self.factors, self.sweep.rounded, top_all, chunks
        )

    def block(self, block: slice, top: TopSet | None) -> Tensor:
        """Fields [F, C, m] of the rows of a block over the whole vocabulary."""
        call, sweep, m = self.call, self.sweep, block.stop - block.start
        fields = torch.empty(
            (sweep.fields, self.starts.shape[0], m), dtype=call.fold_dtype, device=self.ops.device
        )
        at = self.at[:, block]
        factors = None
        if call.plan.frozen:
            factors = Factors(self.kernels, self.ops, self.plan, self.factors[:, block])
        for step, heads in steps(self.ops, self.plan, block):
            places = self.products.kept.place(step)
            made = self.products.make(step, heads, [] if sweep.rounded else places)
            keep = places[0] if sweep.rounded and places else None
            tile = self.ops.tile(step, made)
            part = _part(fields, step, self.chunk)
            if factors is None:
                self.kernels.fold(sweep, tile, part, at, keep)
            else:
                factors.fold(tile, part, at, heads[0])
            if call.plan.has("xent"):
                at[tables.AT.index("taught")] += self.ops.taught(step, made[0])
            if top is not None:
                top.add(made[1], sweep.options[1], step.v0)
        return fields

    def masses(self, fields: Tensor) -> Tensor:
        """[tail_models, chunks, m] log-sum-exp of every chunk of tables.CHUNK columns."""
        found = []
        for prefix in ("", "ref_")[: self.call.plan.tail_models]:
            most, total = (
                fields[tables.FIELDS.index(f"{prefix}{name}")] for name in ("max", "sum")
            )
            lse = torch.where(most == -torch.inf, 0.0, most) + total.log()
            if self.chunk < tables.CHUNK:
                parts = lse.split(tables.CHUNK // self.chunk)
                lse = torch.stack([part.logsumexp(0) for part in parts])
            found.append(lse)
        return torch.stack(found)

    def merge(self, fields: Tensor) -> Tensor:
        """[FIELDS, m]."""
        rows = max(1, MERGED // max(1, fields.shape[0] * fields.shape[1]))
        merge = self.kernels.arithmetic.merge
        parts = [
            merge(self.call, x, self.starts, self.sweep.rounded) for x in fields.split(rows, 2)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
