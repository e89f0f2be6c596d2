"""The operands of a head op, gathered once: heads, scored rows, the call the kernels see."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...stats import ONE_MODEL_STATS, TWO_MODEL_STATS, Stat, parse_stats
from ..eager.rows import Scored, fold_dtype, scored_rows
from .epilogue import PARAMS, Call, LogitOptions, Tile
from .plan import Step

# Folded from products in the working dtype, even a 16-bit one: these are single logits, or sums
# whose error stays that of one rounding. A KL of such logits would be off by half.
FOLDED_ROUNDED = frozenset({"logp", "lse", "zy", "top1", "zmean"})
SMALL_ONE = frozenset({"logp", "lse", "zy"})
SMALL_TWO = SMALL_ONE | {"ref_logp", "ref_lse", "fkl", "rkl"}


class Head(NamedTuple):
    """One model: rows, head and logit options as the op was given them."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    options: LogitOptions


class Operands(NamedTuple):
    """What both directions of a head op work on."""

    call: Call
    scored: Scored
    live: Tensor | None  # [M] bool: rows that count, where some of the M do not
    hidden: tuple[Tensor, ...]  # per model, [M, D] scored rows
    weights: tuple[Tensor, ...]  # per model, [V, D]
    values: Tensor | None  # [V] fold dtype, or [M, k] with columns
    columns: Tensor | None  # [M, k] int64, distinct in a row

    @property
    def M(self) -> int:
        return self.hidden[0].shape[0]

    @property
    def tile_dtype(self) -> torch.dtype:
        return self.call.fold_dtype if self.call.wide else self.call.working

    def element_bytes(self, frozen: bool) -> int:
        """Bytes per logit of the tiles that live at once: products, dx (or a frozen head's terms)
        where it cannot take the policy's place, and sparse values."""
        size = len(self.hidden) * self.tile_dtype.itemsize
        size += self.call.working.itemsize if self.call.wide or frozen else 0
        return size + (self.call.fold_dtype.itemsize if self.columns is not None else 0)

    def weight_tiles(self, v0: int, v1: int) -> list[Tensor]:
        """[w, D] of each model in the working dtype; models that share a head share the tile."""
        made: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        for w in self.weights:
            key = (w.data_ptr(), tuple(w.shape))
            if key not in made:
                made[key] = w[v0:v1].to(self.call.working)
        return [made[w.data_ptr(), tuple(w.shape)] for w in self.weights]

    def advantage(self, step: Step) -> Tensor | None:
        """A of ev on one tile: [w], or [m, w] from sparse values."""
        if self.values is None or self.columns is None:
            return None if self.values is None else self.values[step.v0 : step.v1]
        local = self.columns[step.r0 : step.r1] - step.v0
        outside = (local < 0) | (local >= step.w)
        dense = self.values.new_zeros((step.m, step.w + 1))  # the last column takes what is outside
        dense.scatter_(1, local.masked_fill(outside, step.w), self.values[step.r0 : step.r1])
        return dense[:, : step.w]

    def tile(self, step: Step, products: list[Tensor], **more) -> Tile:
        zr, za = (products[i] if i < len(products) else None for i in (1, 2))
        return Tile(step.r0, step.v0, products[0], zr, za, self.advantage(step), **more)

    def put(self, x: Tensor, n: int) -> Tensor:
        """[k, M, ...] back to [k, n, ...], exactly 0 in rows that do not count."""
        if self.live is not None:
            x = torch.where(self.live.reshape(1, -1, *[1] * (x.dim() - 2)), x, 0.0)
        if n == self.M and self.scored.mask is None and self.live is None:
            return x
        return self.scored.put(x, n, dim=1)


def parse(stats: tuple[str, ...]) -> tuple[Stat, ...]:
    return parse_stats(stats, allowed=ONE_MODEL_STATS + TWO_MODEL_STATS)


def make_call(
    stats: tuple[Stat, ...],
    options: list[LogitOptions],
    ev: str,
    vocabulary: int,
    working: torch.dtype,
    targets: Tensor,  # [M], -1 where a row does not count
    *,
    frozen: bool = False,
    given: bool = False,
) -> Call:
    """The call as kernels see it. `given`: logits exist already, nothing is rounded."""
    names = {s.name for s in stats}
    short = working in (torch.bfloat16, torch.float16) and not given
    wide = short and not names <= FOLDED_ROUNDED
    acc = fold_dtype(working)
    policy = options[0]
    ref = options[1] if len(options) > 1 else None
    aux = options[2] if len(options) > 2 else None
    small = names <= (SMALL_ONE if ref is None else SMALL_TWO)
    # the rarer dtypes have one fold and one gradient, which serve everything
    small = small and working in (torch.bfloat16, torch.float32)
    # bfloat16 tiles of two models (given logits, or logp alone) are rare as well
    small = small and not (ref is not None and working == torch.bfloat16 and not wide)
    found = {s.name: s.param or 0.0 for s in stats}
    numbers = {
        "factor": policy.factor(), "top": policy.top(), "slope": policy.slope(),
        **({} if ref is None else {"ref_factor": ref.factor(), "ref_top": ref.top()}),
        **{name: found.get(name, 0.0) for name in ("alpha", "renyi", "mix", "jsd")},
    }  # fmt: skip
    # filled one by one: a copy from the host would synchronise, and break a graph capture
    params = torch.zeros(len(PARAMS), dtype=acc, device=targets.device)
    for name, number in numbers.items():
        if number != 0.0:
            params[PARAMS.index(name)].fill_(number)
    return Call(
        stats, _with_bias(policy, acc), None if ref is None else _with_bias(ref, acc), aux,
        vocabulary, working, wide, targets, params, small, ev, rounds=wide and not frozen,
    )  # fmt: skip


def _with_bias(options: LogitOptions, acc: torch.dtype) -> LogitOptions:
    """The bias in the fold dtype: V numbers, converted once."""
    return options if options.bias is None else options._replace(bias=options.bias.to(acc))


def gather(
    heads: list[Head],
    targets: Tensor,  # [N]
    ignore_index: int,
    num_scored: int | None,
    stats: tuple[str, ...],
    values: Tensor | None,
    values_index: Tensor | None,
    *,
    frozen: bool = False,
) -> Operands:
    """Scored rows of every operand."""
    n = targets.shape[0]
    scored = scored_rows(targets, ignore_index, num_scored)
    y = targets.index_select(0, scored.index)
    live = None
    if scored.mask is not None or num_scored is not None:
        # a stated count that is too large repeats row 0, which may be one to ignore
        live = y != ignore_index
        y = torch.where(live, y, -1)
    whole = live is None and scored.index.shape[0] == n
    hidden = tuple(h.hidden if whole else scored.take(h.hidden) for h in heads)
    working = heads[0].hidden.dtype
    parsed = parse(stats)
    ev = ""
    if any(s.name == "ev" for s in parsed):
        ev = "aux" if len(heads) == 3 else "values"
    call = make_call(
        parsed, [h.options for h in heads], ev, heads[0].weight.shape[0], working, y, frozen=frozen
    )
    if values is not None:
        values = values.to(call.fold_dtype)
        if values_index is not None:
            values_index = scored.take(values_index)
            values = _distinct(scored.take(values), values_index)
    return Operands(
        call, scored, live, hidden, tuple(h.weight for h in heads), values, values_index
    )


def _distinct(values: Tensor, columns: Tensor) -> Tensor:
    """values [M, k] where entries that name the same column each hold the sum of all of them: a
    scatter then writes equal numbers, in whatever order."""
    step = max(1, (1 << 24) // max(1, columns.shape[1] ** 2))
    parts = [
        torch.where(c[:, :, None] == c[:, None, :], v[:, None, :], 0.0).sum(2)
        for c, v in zip(columns.split(step), values.split(step), strict=True)
    ]
    return torch.cat(parts) if parts else values
