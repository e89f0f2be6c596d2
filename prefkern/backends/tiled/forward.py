"""Forward of the head ops: for each range of columns and block of rows, products and one fold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...stats import NO_GRADIENT
from ..contract import SAVED_ROWS
from . import rows as row_maths
from .epilogue import SECOND_FIELDS, Call, Epilogue, Tile
from .frozen import Frozen
from .heads import Head, Operands, gather
from .plan import Kept, Plan, Step, scratch, tile_plan, tile_view
from .products import full_precision, product
from .topset import TopSet


def forward(
    epilogue: Epilogue,
    heads: list[Head],
    targets: Tensor,  # [N]
    ignore_index: int,
    num_scored: int | None,
    stats: tuple[str, ...],
    cache_rows: int,
    frozen: bool,
    values: Tensor | None = None,
    values_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved [1 | 10, N], cache, rows [n', N, D] or [0])."""
    n, vocabulary = targets.shape[0], heads[0].weight.shape[0]
    ops = gather(
        heads, targets, ignore_index, num_scored, stats, values, values_index, frozen=frozen
    )
    hidden = heads[0].hidden
    shape = (cache_rows, vocabulary) if len(heads) == 1 else (2, cache_rows, vocabulary)
    cache = hidden.new_empty(shape)
    if ops.M == 0:
        out = hidden.new_zeros((len(stats), n), dtype=ops.call.fold_dtype)
        saved = out.new_zeros((1 if len(heads) == 1 else SAVED_ROWS, n))
        grad = sum(s.name not in NO_GRADIENT for s in ops.call.stats)
        rows = out.new_zeros((grad, *hidden.shape) if frozen else 0)
        return out, saved, cache.zero_(), rows
    with full_precision(hidden.device):
        out, saved, rows = _Sweep(epilogue, ops, cache, frozen).run()
    return ops.put(out, n), ops.put(saved, n), cache, rows if not frozen else ops.put(rows, n)


def needs_second(call: Call) -> bool:
    """jsd, tv and bkl need both normalisers before their sweep."""
    return call.has("jsd") or call.has("tv") or call.has("bkl")


def plan_for(epilogue: Epilogue, ops: Operands, frozen: bool = False) -> tuple[Plan, int]:
    """(plan, columns of one chunk); the same in both directions."""
    chunk = epilogue.chunk_columns(ops.call)
    return tile_plan(ops.M, ops.call.V, ops.element_bytes(frozen), chunk), chunk


class Products:
    """The raw products of a step, in the cache where it keeps them, else in scratch tiles."""

    def __init__(self, ops: Operands, plan: Plan, cache: Tensor) -> None:
        self.ops, self.plan = ops, plan
        # only policy and reference are kept
        self.kept = Kept(plan, min(2, len(ops.hidden)), cache.view(-1))
        device = ops.hidden[0].device
        self.tiles = [scratch(plan, ops.tile_dtype, device) for _ in ops.hidden]

    def make(self, step: Step, weights: list[Tensor], *, into_cache: bool) -> list[Tensor]:
        """Products of every model. into_cache: kept tiles are made where they are kept, if the
        cache has their dtype (else the fold writes them there, rounded)."""
        places = self.kept.place(step) if into_cache and not self.ops.call.wide else None
        made = []
        for i, (hidden, weight) in enumerate(zip(self.ops.hidden, weights, strict=True)):
            if places is not None and i < len(places):
                out = places[i]
            else:
                out = tile_view(self.tiles[i], step)
            product(hidden[step.r0 : step.r1], weight.T, out)
            made.append(out)
        return made


class _Sweep:
    """Row blocks one after the other: the chunk fields of all rows at once would be 0.4 GB for a KL
    of 65,536 rows over 152k entries. A block reads the head once, as its products do anyway."""

    def __init__(self, epilogue: Epilogue, ops: Operands, cache: Tensor, frozen: bool) -> None:
        self.epilogue, self.ops, self.call, self.frozen = epilogue, ops, ops.call, frozen
        self.plan, self.chunk = plan_for(epilogue, ops, frozen)
        self.products = Products(ops, self.plan, cache)
        self.chunks = -(-self.call.V // self.chunk)
        self.device = ops.hidden[0].device

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        call, m, acc = self.call, self.ops.M, self.call.fold_dtype
        out = torch.empty((len(call.stats), m), dtype=acc, device=self.device)
        saved = out.new_empty((1 if call.ref is None else SAVED_ROWS, m))
        names = [s.name for s in call.stats if s.name not in NO_GRADIENT]
        rows = out.new_empty((len(names), *self.ops.hidden[0].shape) if self.frozen else 0)
        for r0 in self.plan.row_blocks():
            block = slice(r0, min(r0 + self.plan.rows, m))
            totals = Frozen(self.epilogue, self.ops, self.plan, block) if self.frozen else None
            sums = self.first(block, totals)
            if needs_second(call):
                self.second(block, sums)
            for i, stat in enumerate(call.stats):
                out[i, block] = row_maths.statistic(call, stat.name, sums)
            saved[:, block] = row_maths.saved(call, sums)
            if totals is not None:
                totals.finish(names, sums, rows[:, block])
        self.products.kept.clear_rest()
        return out, saved, rows

    def first(self, block: slice, totals: Frozen | None) -> row_maths.Sums:
        """Sums of the rows of a block over the whole vocabulary."""
        call, m, acc = self.call, block.stop - block.start, self.call.fold_dtype
        fields = torch.empty((len(call.fields), self.chunks, m), dtype=acc, device=self.device)
        at_target = torch.zeros((2, m), dtype=acc, device=self.device)
        top = None
        if call.has("bkl"):
            top = TopSet(m, min(int(call.param("bkl")), call.V), acc, self.device)
        for step, weights in self.steps(block):
            made = self.products.make(step, weights, into_cache=True)
            keep = self.products.kept.place(step) if call.wide else None
            tile = self.ops.tile(step, made, keep=_two(keep))
            part = self.part(fields, step)
            self.epilogue.fold(call, tile, part, at_target)
            if top is not None:
                self.add_top(top, tile)
            if totals is not None:
                totals.add(tile, part, weights[0])
        starts = torch.arange(0, call.V, self.chunk, device=self.device, dtype=torch.float64)
        sums = row_maths.merge(call, fields, starts)
        sums["zy"], sums["ref_zy"] = at_target[0].double(), at_target[1].double()
        sums["target"] = call.targets[block].double()
        if top is not None:
            sums["top_value"], sums["top_index"] = (x.double() for x in top.threshold)
        return sums

    def steps(self, block: slice) -> Iterator[tuple[Step, list[Tensor]]]:
        """Every tile of a block, with the head's rows of its columns."""
        for v0 in self.plan.tiles():
            v1 = min(v0 + self.plan.columns, self.call.V)
            yield Step(block.start, block.stop, v0, v1), self.ops.weight_tiles(v0, v1)

    def part(self, fields: Tensor, step: Step) -> Tensor:
        """Fields of the chunks of one step."""
        first = step.v0 // self.chunk
        return fields[:, first : first + -(-step.w // self.chunk)]

    def add_top(self, top: TopSet, tile: Tile) -> None:
        assert tile.zr is not None
        seen = torch.empty(tile.zr.shape, dtype=self.call.fold_dtype, device=self.device)
        self.epilogue.seen(self.call, tile.zr, tile.v0, seen)
        top.add(seen, slice(0, seen.shape[0]), tile.v0)

    def second(self, block: slice, sums: row_maths.Sums) -> None:
        """Second sweep. Tiles that were kept unrounded are the first sweep's, bit for bit."""
        norms = row_maths.norms(self.call, sums)
        shape = (len(SECOND_FIELDS), self.chunks, block.stop - block.start)
        fields = torch.empty(shape, dtype=self.call.fold_dtype, device=self.device)
        for step, weights in self.steps(block):
            made = None if self.call.wide else self.products.kept.place(step)
            if made is None:
                made = self.products.make(step, weights, into_cache=False)
            tile = Tile(step.r0, step.v0, made[0], made[1])
            self.epilogue.fold_second(self.call, tile, norms, self.part(fields, step))
        row_maths.add_second(sums, fields)


def _two(keep: list[Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if keep is None:
        return None, None
    return keep[0], keep[1] if len(keep) > 1 else None
