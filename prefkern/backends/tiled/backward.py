"""Backward: for each range of columns and block of rows, logits (kept or the same products again),
dL/dx, and its products with the head (dH) and with the rows (dW)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tables
from ..contract import Gradients, HeadCall, Tail
from .epilogue import Epilogue
from .operands import HeadTile, Operands, gather
from .products import add_product, full_precision, product
from .tiles import DX, Products
from .tiling import TileRange, Tiling
from .units import Piece, Units

# A left factor holds rows, a right one columns; the gradient of each is a product with the other.
RIGHT_OF = {"hidden": "weight", "low_in": "low_out"}
RIGHT = ("weight", "low_out", "bias")


@torch.no_grad()  # a backward with create_graph=True comes here with gradients on
def unfold(
    kernels: Epilogue,
    call: HeadCall,
    coefficients: Tensor,
    cache: Tensor,
    needed: frozenset[str],
    tail: Tail | None = None,
) -> Gradients:
    """Gradients of the policy's tensors (prefkern.backends.contract.Backend)."""
    places = {}
    for name in needed:
        like = getattr(call.policy, name)
        places[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
    if call.M == 0:
        return Gradients(**{name: x.zero_() for name, x in places.items()})
    ops = gather(call, backward=True)
    with full_precision(ops.device):
        if tail is not None:
            return _by_units(kernels, ops, coefficients, tail, places)
        plan = ops.plan(kernels.chunk_columns(ops.sweep))
        products = Products(ops, plan, cache)
        return _Unfold(kernels, plan, products, coefficients).run(places)


class _Unfold:
    def __init__(
        self,
        kernels: Epilogue,
        plan: Tiling,
        products: Products,
        coefficients: Tensor,
        skipped: Tensor | None = None,  # [m, chunks of a tile] bool: dx is 0 there
    ) -> None:
        self.kernels, self.plan, self.products, self.ops = kernels, plan, products, products.ops
        self.call, self.coefficients, self.skipped = self.ops.call, coefficients, skipped
        one = self.ops.models[0]
        self.left = {n: x for n, x in (("hidden", one.hidden), ("low_in", one.low_in))
                     if x is not None}  # fmt: skip

    def run(self, places: dict[str, Tensor]) -> Gradients:
        """Fills the places of the gradients that are needed."""
        if self.call.given:
            for step in self.plan.steps(0):
                self.gradient(step, [], places["logits"][step.r0 : step.r1])
            return Gradients(**places)
        sums = self.sums(places)
        for v0 in self.plan.tiles():
            columns = slice(v0, min(v0 + self.plan.columns, self.plan.V))
            parts = {name: x[columns] for name, x in places.items() if name in RIGHT}
            self.columns(columns, parts, sums, fresh=v0 == 0)
        return Gradients(**places | {name: self.ops.put(x) for name, x in sums.items()})

    def sums(self, places: dict[str, Tensor]) -> dict[str, Tensor]:
        """Room for the gradients of the left factors [m, ...]."""
        acc = self.call.fold_dtype
        return {n: torch.empty_like(x, dtype=acc) for n, x in self.left.items() if n in places}

    def columns(
        self, columns: slice, parts: dict[str, Tensor], sums: dict[str, Tensor], *, fresh: bool
    ) -> None:
        """One range of columns: fills its `parts` of the right factors and the bias, and adds to
        the `sums` of the left ones."""
        heads = self.ops.heads(columns.start, columns.stop)
        right = {
            name: _RightSum(parts[other], self.call, self.plan)
            for name, other in RIGHT_OF.items()
            if other in parts
        }
        bias = None
        for step in self.plan.steps(columns.start):
            block, dx = slice(step.r0, step.r1), self.gradient(step, heads)
            for name, total in sums.items():
                factor = getattr(heads[0], RIGHT_OF[name])
                add_product(dx, factor, total[block], fresh=fresh)
            for name, place in right.items():
                place.add(dx, self.left[name][block], step)
            if "bias" in parts:
                part = dx.sum(0, dtype=self.call.fold_dtype)
                bias = part if bias is None else bias.add_(part)
        if bias is not None:
            parts["bias"].copy_(bias)

    def gradient(self, step: TileRange, heads: list[HeadTile], dx: Tensor | None = None) -> Tensor:
        """dL/dx of a step. A kept tile stays as it is, so that a second backward reads the same."""
        kept = self.products.kept.place(step)
        made = self.products.make(step, heads, kept, filled=True)
        if dx is None and (kept or self.call.wide):
            dx = self.products.room(DX if self.call.wide else 0, step, self.call.working)
        dx = made[0] if dx is None else dx
        coefficients = self.coefficients[:, step.r0 : step.r1]
        self.kernels.gradient(self.ops.sweep, self.ops.tile(step, made), coefficients, dx)
        if self.skipped is not None:
            skipped = self.skipped[step.r0 : step.r1]
            whole = step.w // tables.CHUNK
            full, rest = dx.split([whole * tables.CHUNK, step.w - whole * tables.CHUNK], 1)
            if whole:
                full = full.unflatten(1, (whole, tables.CHUNK))
                full.masked_fill_(skipped[:, :whole, None], 0.0)
            if whole < skipped.shape[1]:
                rest.masked_fill_(skipped[:, whole:], 0.0)
        return dx


def _by_units(
    kernels: Epilogue,
    ops: Operands,
    coefficients: Tensor,
    tail: Tail,
    places: dict[str, Tensor],
) -> Gradients:
    """Piece by piece; nothing was kept, so that the budget changes no bit."""
    units = Units(ops, tail)
    products = Products(ops, units.plan, coefficients.new_empty(0, dtype=ops.call.cache_dtype))
    whole = _Unfold(kernels, units.plan, products, coefficients)
    sums, room = whole.sums(places), whole.sums(places)
    for total in sums.values():
        total.zero_()
    for piece in units.pieces():
        right = {name: x[piece.columns] for name, x in places.items() if name in RIGHT}
        parts = right
        if tail.spread is not None and not piece.whole:  # rounded after the spread is added
            parts = {n: torch.empty_like(x, dtype=ops.call.fold_dtype) for n, x in right.items()}
        if piece.m == 0:
            for part in parts.values():
                part.zero_()
        elif piece.rows is None:
            all_rows = _Unfold(kernels, piece.plan, products, coefficients, piece.skipped)
            all_rows.columns(piece.columns, parts, sums, fresh=False)
        else:
            _some_rows(kernels, products, coefficients, piece, parts, sums, room)
        if parts is not right and tail.spread is not None:
            units.spread(piece, tail.spread, parts)
            for name, part in parts.items():
                right[name].copy_(part)
    return Gradients(**places | {name: ops.put(x) for name, x in sums.items()})


def _some_rows(
    kernels: Epilogue,
    products: Products,
    coefficients: Tensor,
    piece: Piece,
    parts: dict[str, Tensor],
    sums: dict[str, Tensor],
    room: dict[str, Tensor],
) -> None:
    """One piece of the rows that it names; `room` is as large as the sums."""
    rows = piece.rows
    assert rows is not None
    own, some = coefficients.index_select(1, rows), products.of(products.ops.take(rows))
    made = {name: x[: piece.m] for name, x in room.items()}
    _Unfold(kernels, piece.plan, some, own, piece.skipped).columns(
        piece.columns, parts, made, fresh=True
    )
    for name, x in made.items():
        sums[name].index_add_(0, rows, x)  # no row comes twice, so the bits repeat


class _RightSum:
    """The gradient of some rows of a right factor: one product where one block holds all rows, else
    a sum in the fold dtype that is rounded once."""

    def __init__(self, place: Tensor, call: HeadCall, plan: Tiling) -> None:
        self.place, self.m, self.several = place, plan.M, plan.rows < plan.M
        self.total = place
        if self.several and place.dtype != call.fold_dtype:
            self.total = torch.empty_like(place, dtype=call.fold_dtype)

    def add(self, dx: Tensor, left: Tensor, step: TileRange) -> None:
        """dx [m, w], left [m, D] of one block of rows."""
        if not self.several:
            product(dx.T, left, self.place)
            return
        add_product(dx.T, left, self.total, fresh=step.r0 == 0)
        if step.r1 == self.m and self.total is not self.place:
            self.place.copy_(self.total)
