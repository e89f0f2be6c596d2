"""Which part of the logits is one tile, and which tiles are kept for the backward.

Both follow from shapes alone, so that the forward and the backward make the same products and a
kept tile has the bits of a recomputed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Leading dimensions are multiples of 16 elements: fast products want 16-byte rows, and Triton only
# tells strides that 16 divides from others.
ALIGN = 16
ROW_ALIGN = 128


class TileRange(NamedTuple):
    """One tile: rows [r0, r1), columns [v0, v1)."""

    r0: int
    r1: int
    v0: int
    v1: int

    @property
    def m(self) -> int:
        return self.r1 - self.r0

    @property
    def w(self) -> int:
        return self.v1 - self.v0

    @property
    def stride(self) -> int:
        return stride_of(self.w)


def stride_of(columns: int) -> int:
    """Leading dimension of a tile."""
    return -(-columns // ALIGN) * ALIGN


class Tiling(NamedTuple):
    """Row blocks of `rows` out of M, tiles of `columns` out of V."""

    M: int
    V: int
    rows: int
    columns: int

    def row_blocks(self) -> range:
        return range(0, self.M, self.rows)

    def blocks(self) -> list[slice]:
        """At least one, which may be empty."""
        firsts = list(self.row_blocks()) or [0]
        return [slice(r0, min(r0 + self.rows, self.M)) for r0 in firsts]

    def tiles(self) -> range:
        return range(0, self.V, self.columns)

    def steps(self, v0: int) -> Iterator[TileRange]:
        """The tiles of one range of columns."""
        v1 = min(v0 + self.columns, self.V)
        for r0 in self.row_blocks():
            yield TileRange(r0, min(r0 + self.rows, self.M), v0, v1)

    @property
    def largest(self) -> int:
        """Elements of the largest tile."""
        return self.rows * stride_of(self.columns)


def make_tiling(
    m: int, v: int, element_bytes: int, chunk: int, limit: int, *, even: bool = True
) -> Tiling:
    """Row blocks and tile widths (multiples of `chunk`) for tiles that take `element_bytes` per
    logit and `limit` bytes at most; ROW_ALIGN rows of one chunk are the least. `even`: as many
    tiles as the limit asks for, all of about one width; else as wide as may be, and a rest.

    Each tile adds its part to dH [rows, D] in fp32, and, where there are several row blocks, to dW
    [columns, D]: traffic of 8 D (rows + columns) bytes against 2 D rows columns operations. With T
    elements in a tile one block of all rows costs 1 / columns = M / T, square tiles 2 / sqrt(T).
    """
    elements = max(1, limit // element_bytes)
    side = math.isqrt(elements)
    tallest = elements // stride_of(min(chunk, v))  # rows of the narrowest tile
    rows = max(1, m)
    if m > min(2 * side, tallest):
        most = max(ROW_ALIGN, min(side, tallest) // ROW_ALIGN * ROW_ALIGN)
        rows = -(-m // -(-m // most))
        rows = min(m, -(-rows // ROW_ALIGN) * ROW_ALIGN)
    width = max(1, elements // rows // chunk)  # in chunks
    if even:
        chunks = -(-v // chunk)
        width = max(1, -(-chunks // max(1, -(-chunks // width))))
    return Tiling(m, v, rows, min(width * chunk, v))


def given_tiling(m: int, v: int, fields: int, chunk: int, limit: int) -> Tiling:
    """Logits that exist already are one tile; rows are cut where their chunk sums would be more
    than the tiles of other calls."""
    rows = max(1, (limit >> 2) // (fields * -(-v // chunk)))
    return Tiling(m, v, max(1, min(m, rows)), v)


class Kept(NamedTuple):
    """Tiles of the first `models` models as far as they fit the cache, in the order of the sweep. A
    tile is kept whole or not at all; where `cache` ends it is recomputed by the same product."""

    plan: Tiling
    models: int
    cache: Tensor  # flat

    def place(self, step: TileRange) -> list[Tensor]:
        """Where the tiles of a step lie, one [m, w] view per model; none where they do not fit."""
        # every range of columns before this one is of full width
        before = step.v0 // self.plan.columns * self.plan.M * stride_of(self.plan.columns)
        before += step.r0 * step.stride
        size = step.m * step.stride
        if (before + size) * self.models > self.cache.numel():
            return []
        first = before * self.models
        return [
            tile_view(self.cache[first + i * size : first + (i + 1) * size], step)
            for i in range(self.models)
        ]

    def clear_rest(self) -> None:
        """Zeroes what holds no logit: an output never shows what was in memory before."""
        end = 0
        for v0 in self.plan.tiles():
            for step in self.plan.steps(v0):
                size = step.m * step.stride * self.models
                if end + size > self.cache.numel():
                    break
                if step.stride > step.w:
                    padded = self.cache[end : end + size].view(-1, step.stride)
                    padded[:, step.w :].zero_()
                end += size
        self.cache[end:].zero_()


def tile_view(flat: Tensor, step: TileRange) -> Tensor:
    """The [m, w] tile at the start of a flat buffer."""
    return flat[: step.m * step.stride].view(step.m, step.stride)[:, : step.w]


def scratch(plan: Tiling, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer for the largest tile of the plan."""
    return torch.empty(plan.largest, dtype=dtype, device=device)
