"""Backward of the head ops: for each range of columns and block of rows, logits (kept or the same
products again), dL/dx, and its products with the head (dH) and the hidden rows (dW)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..eager.rows import fold_dtype
from . import filtering
from . import rows as row_maths
from .epilogue import Epilogue
from .forward import Products, plan_for
from .frozen import frozen_gradient
from .heads import Head, gather
from .plan import Step, scratch, tile_view
from .products import add_product, full_precision, product


def backward(
    epilogue: Epilogue,
    heads: list[Head],
    d_out: Tensor,  # [n, N]
    targets: Tensor,  # [N]
    out: Tensor,  # [n, N]
    saved: Tensor,  # [1 | 10, N]
    cache: Tensor,
    rows: Tensor,
    ignore_index: int,
    num_scored: int | None,
    stats: tuple[str, ...],
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    values: Tensor | None = None,
    values_index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden [N, D], d_weight [V, D], d_bias [V]); [0] where not needed."""
    hidden, weight = heads[0].hidden, heads[0].weight
    if rows.dim() == 3:
        counts = targets != ignore_index
        d_hidden = frozen_gradient(d_out, rows, stats, counts, hidden)
        return d_hidden, weight.new_empty(0), hidden.new_empty(0)
    ops = gather(heads, targets, ignore_index, num_scored, stats, values, values_index)
    call, index = ops.call, ops.scored.index
    if ops.scored.mask is not None:
        cache = cache.new_empty(0)  # a forward outside this capture kept other rows
    bias = heads[0].options.bias
    d_weight = weight.new_empty(weight.shape if need_weight else 0)
    d_bias = hidden.new_empty(0)
    if need_bias:
        assert bias is not None
        d_bias = torch.empty_like(bias)
    if ops.M == 0:
        empty = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
        return empty, d_weight.zero_(), d_bias.zero_()
    coefficients = row_maths.coefficients(
        call, d_out.index_select(1, index), out.index_select(1, index), saved.index_select(1, index)
    )
    limit = filtering.limits(coefficients, call.working) if filtering.on(call.working) else None
    d_rows = hidden.new_empty((ops.M if need_hidden else 0, hidden.shape[1]), dtype=call.fold_dtype)
    with full_precision(hidden.device):
        plan, _ = plan_for(epilogue, ops)
        products = Products(ops, plan, cache)
        # A kept tile stays as it is, so that a second backward reads the same; a wide one has
        # another dtype. Otherwise dx takes the place of the policy's products.
        apart = scratch(plan, call.working, hidden.device) if call.wide else products.tiles[0]
        for v0 in plan.tiles():
            v1 = min(v0 + plan.columns, call.V)
            weights = ops.weight_tiles(v0, v1)
            total = _WeightTile(d_weight[v0:v1], plan.rows < ops.M) if need_weight else None
            bias_total = None
            for step in plan.steps(v0):
                made = products.kept.place(step)
                if made is None or len(made) < len(ops.hidden):
                    made = _missing(products, step, weights, made)
                dx = tile_view(apart, step)
                epilogue.gradient(
                    call, ops.tile(step, made), coefficients[:, step.r0 : step.r1], dx
                )
                block = slice(step.r0, step.r1)
                if need_bias:
                    part = dx.sum(0, dtype=call.fold_dtype)
                    bias_total = part if bias_total is None else bias_total + part
                columns = None if limit is None else filtering.active_columns(dx, limit[block])
                weight_tile = weights[0]
                if columns is not None:
                    dx, weight_tile = dx.index_select(1, columns), weight_tile[columns]
                if need_hidden:
                    add_product(dx, weight_tile, d_rows[block], fresh=v0 == 0)
                if total is not None:
                    total.add(
                        dx, ops.hidden[0][block], columns,
                        first=step.r0 == 0, last=step.r1 == ops.M,
                    )  # fmt: skip
            if bias_total is not None:
                d_bias[v0:v1] = bias_total
    d_hidden = hidden.new_empty(0)
    if need_hidden:
        d_hidden = ops.put(d_rows[None], hidden.shape[0])[0].to(hidden.dtype)
    return d_hidden, d_weight, d_bias


def _missing(
    products: Products, step: Step, weights: list[Tensor], made: list[Tensor] | None
) -> list[Tensor]:
    """Products of the models that are not kept (a third head never is)."""
    if made is None:
        return products.make(step, weights, into_cache=False)
    out = tile_view(products.tiles[2], step)
    product(products.ops.hidden[2][step.r0 : step.r1], weights[2].T, out)
    kept = made[0].dtype
    if out.dtype != kept:
        # kernels read models of one dtype; the policy's own wide tile is free where it was kept
        out = tile_view(products.tiles[0].view(kept), step).copy_(out)
    return [*made, out]


class _WeightTile:
    """dW of one range of columns: one product where one block holds all rows, else an fp32 sum that
    is rounded once."""

    def __init__(self, place: Tensor, several: bool) -> None:
        self.place = place
        self.total = place
        if several and place.dtype not in (torch.float32, torch.float64):
            self.total = torch.empty_like(place, dtype=torch.float32)
        self.several = several

    def add(
        self, dx: Tensor, hidden: Tensor, columns: Tensor | None, *, first: bool, last: bool
    ) -> None:
        """dx [m, w], or [m, k] of the `columns` [k] that filtering left."""
        direct = columns is None and not (
            self.total.dtype == torch.float64 and dx.dtype != torch.float64
        )
        if direct and not self.several:
            product(dx.T, hidden, self.total)
        elif direct:
            add_product(dx.T, hidden, self.total, fresh=first)
        else:
            shape = (dx.shape[1], hidden.shape[1])
            part = torch.empty(shape, dtype=fold_dtype(dx.dtype), device=dx.device)
            product(dx.T, hidden, part)
            if first:
                self.total.zero_()
            rows = slice(None) if columns is None else columns
            self.total[rows] += part.to(self.total.dtype)
        if last and self.total is not self.place:
            self.place.copy_(self.total)
