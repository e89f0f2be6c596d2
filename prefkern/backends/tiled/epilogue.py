"""What a backend's kernels do to one tile of logits, and the records they exchange with the driver.

Shapes: M computed rows, m rows of one row block, V vocabulary, w columns of one tile, C chunks.

A tile is raw products [m, w] of one to three models (policy, reference, third head). A logit is

    z = top * tanh(u)  with a cap, else  u,     u = factor * (x + bias)

where u is computed in exactly this order and without contraction, so that every kernel and the
driver see the same bits (bkl compares u for equality; a cap keeps their order). Numbers per row and
chunk are laid out as prefkern.backends.tables says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import tables
from ..contract import Arithmetic, HeadCall, Model

# Scalars of a call [PARAMS] in the fold dtype: factor and top of policy, reference and third head
# (top 0: no cap), slope = temperature / softcap of the policy (dz/dx = constant (1 - (slope z)^2)),
# and the parameters of alpha, renyi, mix, jsd (0 where not asked for).
PARAMS = (
    "factor", "top", "ref_factor", "ref_top", "aux_factor", "aux_top", "slope",
    "alpha", "renyi", "mix", "jsd",
)  # fmt: skip
# What is there, as bits of one number; values: A of ev, alpha to bkl: the statistic is asked for.
FLAGS = (
    "bias", "ref_bias", "aux_bias", "keep", "values", "teacher", "third",
    "alpha", "renyi", "mix", "jsd", "tv", "bkl",
)  # fmt: skip
# A kernel comes in two sizes: the smaller folds or differentiates these alone.
SMALL = frozenset({"logp", "lse", "zy", "xent", "ref_logp", "ref_lse", "fkl", "rkl"})


class LogitOptions(NamedTuple):
    """How the kernels make a logit of one model."""

    factor: float
    top: float
    slope: float
    bias: Tensor | None  # [V] fold dtype

    @staticmethod
    def of(model: Model, dtype: torch.dtype) -> LogitOptions:
        bias = None if model.bias is None else model.bias.to(dtype)
        if model.softcap == 0.0:
            return LogitOptions(model.scale / model.temperature, 0.0, 0.0, bias)
        cap, temperature = model.softcap, model.temperature
        return LogitOptions(model.scale / cap, cap / temperature, temperature / cap, bias)

    def before_cap(self, x: Tensor, v0: int, dtype: torch.dtype) -> Tensor:
        """u of products [m, w] from column v0 on, with the bits that kernels have."""
        x = x.to(dtype)
        if self.bias is not None:
            x = x + self.bias[v0 : v0 + x.shape[1]]
        return x * self.factor

    def capped(self, u: Tensor) -> Tensor:
        """Logits."""
        return u if self.top == 0.0 else self.top * torch.tanh(u)


@dataclass(frozen=True)
class Sweep:
    """One call as the kernels see it, in either direction."""

    call: HeadCall
    targets: Tensor  # [M] int64; rows that hold call.ignore_index: read nothing there, write 0
    options: tuple[LogitOptions, ...]  # policy, reference, third head

    @property
    def tile_dtype(self) -> torch.dtype:
        """Dtype of the products that a fold reads."""
        return self.call.fold_dtype if self.call.wide else self.call.working

    @property
    def rounded(self) -> bool:
        """A backward reads products rounded to the working dtype, and tiles are not: a fold also
        forms the policy's normaliser of the rounded ones, and a gradient rounds what it reads."""
        return self.call.rounds and self.call.wide

    @property
    def widest_chunk(self) -> int:
        """Columns whose sums may be one."""
        return tables.CHUNK if self.call.plan.tail > 0.0 else 4096

    @property
    def backward_models(self) -> int:
        """How many of the models a gradient reads."""
        plan = self.call.plan
        if plan.ev == "aux" and plan.grows("ev"):
            return 3
        return 2 if plan.reads_reference else 1

    @property
    def small_fold(self) -> bool:
        names = {s.name for s in self.call.plan.stats}
        return names <= SMALL and self._has_small(len(self.options))

    @property
    def small_gradient(self) -> bool:
        plan = self.call.plan
        names = {s.name for s in plan.stats if plan.grows(s.name)}
        return names <= SMALL - {"xent"} and self._has_small(self.backward_models)

    def _has_small(self, models: int) -> bool:
        """float32 and bfloat16 have small kernels; of two bfloat16 tiles (given logits, or two
        models for the sake of one) there is one size."""
        if models > 1:
            return self.tile_dtype == torch.float32 and self.call.working != torch.float16
        return self.call.working in (torch.float32, torch.bfloat16)

    @property
    def fields(self) -> int:
        """The first fields, which a fold of this size writes."""
        if not self.small_fold:
            return len(tables.FIELDS)
        return tables.SMALL_ONE_MODEL if len(self.options) == 1 else tables.SMALL_TWO_MODEL

    @cached_property
    def numbers(self) -> list[float]:
        """PARAMS."""
        found: dict[str, float] = {name: self.call.plan.param(name) for name in PARAMS}
        for prefix, option in zip(("", "ref_", "aux_"), self.options, strict=False):
            found |= {f"{prefix}factor": option.factor, f"{prefix}top": option.top}
        found["slope"] = self.options[0].slope
        return [found[name] for name in PARAMS]

    @cached_property
    def params(self) -> Tensor:
        """[PARAMS] on the device, made there: a copy from the host would synchronise, and break a
        graph capture."""
        made = torch.zeros(len(PARAMS), dtype=self.call.fold_dtype, device=self.targets.device)
        torch._foreach_add_(list(made.unbind()), self.numbers)  # one kernel
        return made


@dataclass(frozen=True)
class ProductTile:
    """Raw products of rows [r0, r0 + m) and columns [v0, v0 + w); last dimension contiguous."""

    r0: int
    v0: int
    x: tuple[Tensor, ...]  # [m, w] of policy, reference, third head; as many as are read
    adv: Tensor | None = None  # [w] (one row for all) or [m, w]: A of ev, or xent's teacher

    @property
    def rows(self) -> slice:
        return slice(self.r0, self.r0 + self.x[0].shape[0])


class FrozenSums(NamedTuple):
    """Sums of head rows of one row block, gathered so far."""

    names: tuple[str, ...]  # of tables.FACTORS; "mass" first
    totals: Tensor  # [names, m, D + r] fold dtype, relative to the maxima
    maxima: Tensor  # [2, m] fold dtype, finite; of policy and reference
    started: bool  # totals hold something


class Epilogue(Protocol):
    """Kernels of one backend. Every tensor is on one device, on torch's current stream; no function
    synchronises, and each is safe under graph capture."""

    arithmetic: Arithmetic

    def chunk_columns(self, sweep: Sweep) -> int:
        """Columns of one chunk, a power of two of at most 4096 (with a tail tables.CHUNK) and the
        same for every tile of a call. Tiles are as wide as a multiple of it, the vocabulary's last
        tile may be narrower."""
        ...

    def fold(
        self, sweep: Sweep, tile: ProductTile, fields: Tensor, at: Tensor, keep: Tensor | None
    ) -> None:
        """First sweep, ONE read of each tile. For each row and chunk one number per field: sums in
        the fold dtype relative to the chunk's own maxima, so that a kernel keeps no state between
        tiles, needs no atomics and gives the same bits in any order. Writes the fields that
        `contract.written` names, among the first sweep.fields: fields [sweep.fields, chunks, m] is
        a strided view, last dimension contiguous. at [AT, m] float64 gets zy (and ref_zy) of the
        rows whose target lies in this tile and is left alone elsewhere. `keep` [m, w] gets the
        policy's products rounded to the working dtype; only where sweep.rounded."""
        ...

    def fold_again(self, sweep: Sweep, tile: ProductTile, norms: Tensor, fields: Tensor) -> None:
        """Second sweep (jsd, tv, bkl): norms [NORMS, m], fields [SECOND, chunks, m]; those of
        statistics that were not asked for are left alone."""
        ...

    def fold_frozen(
        self,
        sweep: Sweep,
        tile: ProductTile,
        fields: Tensor,
        at: Tensor,
        sums: FrozenSums,
        out: Tensor,
    ) -> None:
        """Frozen head: what `fold` does; sums.maxima raised to the tile's own, sums.totals moved
        there if there are any; out [m, w] = the terms of the mass. `fold_in_steps` does it by the
        other functions here, a backend may do it in one kernel."""
        ...

    def factor(
        self, sweep: Sweep, tile: ProductTile, maxima: Tensor, name: str, out: Tensor
    ) -> None:
        """Frozen head: out [m, w] in the working dtype = the terms that multiply W in the sum
        `name` (tables.FACTORS); maxima [2, m] of policy and reference, finite."""
        ...

    def raise_rows(self, names: tuple[str, ...], totals: Tensor, shift: Tensor) -> None:
        """Frozen head: moves totals [len(names), m, D] to larger maxima; shift [4, m] = fp, fr, dp,
        dr in totals' dtype. With the mass t0 before the move: mass = fp t0, log = fp (log + dp t0),
        ref = fr ref, cross = fp (cross + (dp - dr) t0). A row with fp = fr = 1 and dp = dr = 0 is
        not touched. names[0] is always "mass"."""
        ...

    def gradient(self, sweep: Sweep, tile: ProductTile, coefficients: Tensor, dx: Tensor) -> None:
        """ONE read of each tile, ONE write of dx [m, w] = dL/dx in the working dtype; coefficients
        [COEFFICIENTS, m]. tile.x holds the sweep.backward_models first models. dx may be
        tile.x[0] itself."""
        ...


def fold_in_steps(
    kernels: Epilogue,
    sweep: Sweep,
    tile: ProductTile,
    fields: Tensor,
    at: Tensor,
    sums: FrozenSums,
    out: Tensor,
) -> None:
    """`Epilogue.fold_frozen`."""
    kernels.fold(sweep, tile, fields, at, None)
    old = sums.maxima.clone() if sums.started else sums.maxima
    names = ("max", "ref_max") if sweep.call.ref else ("max",)
    for row, name in zip(sums.maxima, names, strict=False):
        torch.maximum(row, fields[tables.FIELDS.index(name)].amax(0), out=row)
    if sums.started:
        moves = old.sub_(sums.maxima)
        kernels.raise_rows(sums.names, sums.totals, torch.cat([moves.exp(), moves]))  # SHIFT
    kernels.factor(sweep, tile, sums.maxima, "mass", out)
