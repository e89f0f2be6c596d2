"""Frozen head: the forward forms rows[s] = sum_v (d stat_s / dx_v) W_v, so that the backward is a
multiplication. Sums of weighted head rows are kept relative to each row's maximum so far."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...stats import NO_GRADIENT
from .epilogue import FACTORS, Epilogue, Tile
from .heads import Operands
from .plan import Plan, Step, scratch, tile_view
from .products import add_product
from .rows import Sums, safe


class Frozen:
    """Of one row block: totals [sums, m, D] in the fold dtype, and the maxima [2, m] they are
    relative to."""

    def __init__(self, epilogue: Epilogue, ops: Operands, plan: Plan, block: slice) -> None:
        call = ops.call
        self.epilogue, self.ops, self.call, self.block = epilogue, ops, call, block
        wanted = {"log": "ent", "ref": "fkl", "cross": "rkl"}
        self.names = tuple(n for n in FACTORS if n == "mass" or call.has(wanted[n]))
        hidden = ops.hidden[0]
        m, depth = block.stop - block.start, hidden.shape[1]
        self.totals = hidden.new_empty((len(self.names), m, depth), dtype=call.fold_dtype)
        self.maxima = hidden.new_full((2, m), -math.inf, dtype=call.fold_dtype)
        self.terms = scratch(plan, call.working, hidden.device)

    def add(self, tile: Tile, fields: Tensor, weight: Tensor) -> None:
        """After the fold of a tile: raises the maxima to those in its fields [F, C, m], moves the
        sums there and adds the tile's terms times its head rows [w, D]."""
        old = self.maxima
        second = 0 if self.call.ref is None else self.call.fields.index("ref_max")
        found = torch.stack([fields[0].amax(0), fields[second].amax(0)])
        new = torch.maximum(old, found)
        first = tile.v0 == 0
        if not first:
            shift = safe(old) - safe(new)
            moved = torch.where(old == -math.inf, -math.inf, shift)
            moves = torch.cat([moved.exp(), shift])
            self.epilogue.raise_rows(self.names, self.totals, moves)
        self.maxima = new
        m, w = tile.z.shape
        terms = tile_view(self.terms, Step(0, m, 0, w))
        for i, name in enumerate(self.names):
            self.epilogue.factor(self.call, tile, safe(new), name, terms)
            add_product(terms, weight, self.totals[i], fresh=first)

    def finish(self, stats: list[str], s: Sums, rows: Tensor) -> None:
        """Writes rows [n', m, D] of the differentiable statistics."""
        call, acc = self.call, self.call.fold_dtype
        total = dict(zip(self.names, self.totals, strict=True))
        slope = call.policy.scale / call.policy.temperature
        u = s["zy"] * call.policy.slope()
        log_s = s["sum"].log()

        def column(x: Tensor) -> Tensor:
            return x.to(acc)[:, None]

        p = slope / s["sum"]
        at_target = None
        if "logp" in stats or "zy" in stats:
            y = call.targets[self.block].clamp(min=0)
            at_target = self.ops.weights[0].index_select(0, y).to(acc)
            at_target *= column(slope * (1.0 - u * u))
        for i, name in enumerate(stats):
            assert name not in NO_GRADIENT
            mass = total["mass"]
            if name == "logp":
                assert at_target is not None
                torch.addcmul(at_target, mass, column(p), value=-1, out=rows[i])
            elif name == "lse":
                torch.mul(mass, column(p), out=rows[i])
            elif name == "zy":
                assert at_target is not None
                rows[i] = at_target
            elif name == "ent":
                ent = log_s - s["x"] / s["sum"]
                torch.mul(mass, column(p * (log_s - ent)), out=rows[i])
                rows[i].addcmul_(total["log"], column(p), value=-1)
            elif name == "fkl":
                torch.mul(mass, column(p), out=rows[i])
                rows[i].addcmul_(total["ref"], column(slope / s["ref_sum"]), value=-1)
            elif name == "rkl":
                shift = s["ref_sum"].log() - log_s
                rkl = s["pol_cross"] / s["sum"] + shift
                torch.mul(mass, column(p * (shift - rkl)), out=rows[i])
                rows[i].addcmul_(total["cross"], column(p))
            else:
                raise AssertionError(f"{name!r} has no row of a frozen head")


def frozen_gradient(
    d_out: Tensor,  # [n, N]
    rows: Tensor,  # [n', N, D]
    stats: tuple[str, ...],
    counts: Tensor,  # [N] bool
    hidden: Tensor,
) -> Tensor:
    """sum_s d_out[s] rows[s] [N, D] in hidden's dtype; 0 in rows that do not count."""
    grad = [i for i, s in enumerate(stats) if s.partition(":")[0] not in NO_GRADIENT]
    total = torch.zeros_like(rows[0]) if not grad else rows.new_empty(rows.shape[1:])
    for j, i in enumerate(grad):
        c = torch.where(counts, d_out[i].to(rows.dtype), 0.0)[:, None]
        if j == 0:
            torch.mul(rows[0], c, out=total)
        else:
            total.addcmul_(rows[j], c)
    return total.to(hidden.dtype)
