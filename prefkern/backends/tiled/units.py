"""Which rows and columns a backward with a tail multiplies together (prefkern.ops.tail).

A piece is 1, 2, 4 ... chunks of a tile and the rows that are active in any of them, with a dx of 0
where a unit is not. Narrow pieces multiply fewer units that nobody needs, wide ones are fewer: each
costs about 20 small kernels beside its products. A tile is halved as long as that is cheaper, by
the counts of rows of every possible piece, which are asked once: that waits for the device. Where a
graph is captured nothing may wait: every tile is then one piece of all rows, which saves nothing.

Beside its 6,144 D operations a unit moves about 20 D bytes (its row gathered, its part of dH
written and added) in a piece of one chunk, and as much for all chunks together in a wider one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tables
from ..contract import Tail
from .operands import Operands
from .tiling import Tiling

# What a piece costs whatever its size, in operations: 0.2 ms of a host, or of an H100's products.
PIECE = 1.5e11


class Piece(NamedTuple):
    """Some rows of one range of columns."""

    chunks: range
    columns: slice
    m: int  # rows
    rows: Tensor | None  # [m]; None: all of them
    skipped: Tensor | None  # [m, chunks] bool; None: all units are active
    plan: Tiling

    @property
    def whole(self) -> bool:
        """Nothing is left out."""
        return self.m > 0 and self.rows is None and self.skipped is None


class Units:
    def __init__(self, ops: Operands, tail: Tail) -> None:
        # tiles are cut into halves: even ones would lose up to half to the power of two
        self.ops, self.plan = ops, ops.plan(tables.CHUNK, even=False)
        self.active = tail.active & (ops.sweep.targets != ops.call.ignore_index)  # [C, M]

    def pieces(self) -> Iterator[Piece]:
        last = self.ops.call.chunks
        width = 1 << (max(1, self.plan.columns // tables.CHUNK).bit_length() - 1)
        tiles = [range(c, min(c + width, last)) for c in range(0, last, width)]
        counts = counts_of(self.active, width)
        for tile in tiles:
            if counts is None:
                yield self.piece(tile, self.ops.m, masked=True)
                continue
            _, found = split(tile, width, counts, PIECE / (6 * tables.CHUNK * self.ops.depth))
            for chunks, rows in found:
                units = sum(counts[0][c] for c in chunks)
                yield self.piece(chunks, rows, masked=units < len(chunks) * rows)

    def piece(self, chunks: range, count: int, *, masked: bool) -> Piece:
        first, end = chunks.start * tables.CHUNK, chunks.stop * tables.CHUNK
        columns = slice(first, min(end, self.plan.V))
        active, rows = self.active[chunks.start : chunks.stop], None
        if 0 < count < self.ops.m:
            rows = torch.nonzero_static(active.any(0), size=count).flatten()
            active = active.index_select(1, rows) if masked else active
        skipped = ~active.T if masked else None
        # as many rows at a time as make a tile of the usual size
        taller = self.plan.rows * max(1, self.plan.columns // len(chunks) // tables.CHUNK)
        plan = Tiling(count, self.plan.V, min(taller, max(1, count)), len(chunks) * tables.CHUNK)
        return Piece(chunks, columns, count, rows, skipped, plan)

    def spread(self, piece: Piece, spread: Tensor, parts: dict[str, Tensor]) -> None:
        """Adds to rows of the right factors what skipped units leave them: [C, D + r + 1]."""
        one = self.ops.models[0]
        assert one.hidden is not None
        depth = one.hidden.shape[1]
        own: dict[str, slice | int] = {
            "weight": slice(0, depth), "low_out": slice(depth, -1), "bias": -1,
        }  # fmt: skip
        for name, part in parts.items():
            for c, some in zip(piece.chunks, part.split(tables.CHUNK), strict=True):
                some.add_(spread[c][own[name]])


def counts_of(active: Tensor, width: int) -> list[list[int]] | None:
    """Rows that are active in one of 1, 2, 4 ... `width` neighbouring chunks, for each such group;
    None where the host must not wait."""
    if active.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    chunks, rows = active.shape
    padded = active.new_zeros((-(-chunks // width) * width, rows))
    padded[:chunks] = active
    levels = [padded]
    while levels[-1].shape[0] * width > padded.shape[0]:
        levels.append(levels[-1].view(-1, 2, rows).any(1))
    sums = torch.cat(levels).sum(1).tolist()
    found = []
    for level in levels:
        found.append(sums[: level.shape[0]])
        del sums[: level.shape[0]]
    return found


def split(
    chunks: range, width: int, counts: list[list[int]], each: float
) -> tuple[float, list[tuple[range, int]]]:
    """The cheapest pieces of a group of up to `width` chunks: (cost in units, (chunks, rows))."""
    rows = counts[width.bit_length() - 1][chunks.start // width]
    whole = len(chunks) * rows + each, [(chunks, rows)]
    if width == 1 or len(chunks) == 1 or rows == 0:
        return whole
    half = width // 2
    parts = [chunks[:half], chunks[half:]]
    found = [split(part, half, counts, each) for part in parts if len(part)]
    halves = sum(cost for cost, _ in found), [piece for _, some in found for piece in some]
    return min(whole, halves, key=lambda way: way[0])
