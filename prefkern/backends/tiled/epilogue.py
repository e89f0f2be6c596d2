"""What a backend's kernels do to one tile of logits, and the records they exchange with the driver.

Shapes: M scored rows, m rows of one row block, V vocabulary, w columns of one tile, C chunks.

A tile is raw products [m, w] of one to three models (policy, reference, third head). A logit is

    z = top * tanh(factor * (x + bias))  with a cap, else  factor * (x + bias)

computed in exactly this order and without contraction, so that every kernel sees the same bits
(bkl compares logits for equality). `x` is first rounded to the working dtype where it is read as
the backward reads it.

First sweep. The columns of a tile are cut into chunks of at most `chunk_columns`; for each row and
chunk the kernel writes one number per field of `call.fields`: sums in the fold dtype, relative to
the chunk's own maxima. The driver merges all chunks of a row in fp64 at the end (merge.py), so a
kernel keeps no state between tiles, needs no atomics, and gives the same bits in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...stats import Stat

# Fields of a chunk. x = z - max of its own model in this chunk (max counts as 0 where it is -inf),
# e = exp(x), er = exp(xr); a term with e = 0 is 0 whatever it multiplies. `round_*`: the same
# normaliser over logits of products rounded to the working dtype (only where call.wide).
#   x: sum e x          sq: sum e e           z_sum, z_count: finite logits
#   top: column, counted from the chunk's first, of the first largest logit
#   ref_cross: sum er (xr - x)                pol_cross: sum e (x - xr)
#   alpha_, renyi_, mix_: log-sum-exp of u = x + a (xr - x); u = x for a = 0, xr for a = 1, and -inf
#       where that is not a number. plain_: of z + b (zr - z) with mix's b, from rounded products
#   adv: sum e A (given values), or sum e (xa - xr) with a third head
ONE_MODEL_FIELDS = (
    "max", "sum",
    "x", "sq", "z_sum", "z_count", "top", "round_max", "round_sum",
)  # fmt: skip
TWO_MODEL_FIELDS = (
    "max", "sum", "ref_max", "ref_sum", "ref_cross", "pol_cross",
    "round_max", "round_sum", "ref_round_max", "ref_round_sum",
    "x", "sq", "z_sum", "z_count", "top", "alpha_max", "alpha_sum", "renyi_max", "renyi_sum",
    "mix_max", "mix_sum", "plain_max", "plain_sum", "adv",
    "aux_max", "aux_sum", "aux_round_max", "aux_round_sum",
)  # fmt: skip
# A fold kernel comes in two sizes per number of models: the first `SMALL_*` fields, or all.
SMALL_ONE_MODEL = 2
SMALL_TWO_MODEL = 10

# Fields of the second sweep, plain sums over the chunk of p = exp(z - lse), r = exp(zr - ref_lse):
#   kl_ref: r (log r - log m)   kl_pol: p (log p - log m)   m = b r + (1-b) p
#   tv: |p - r|     tv_mean: p sign(p - r)
#   top_kl: r (log r - log p) over the top set      rest_ref, rest_pol: r, p outside it
SECOND_FIELDS = ("kl_ref", "kl_pol", "tv", "tv_mean", "top_kl", "rest_ref", "rest_pol")

# Row constants of the second sweep [NORMS, M]: both normalisers in two parts (high + low loses
# nothing of a large one), and the top set (`v` is inside if seen > value, or == and v <= index).
NORMS = ("lse", "lse_low", "ref_lse", "ref_lse_low", "top_value", "top_index")

# Row constants of the gradient [COEFFICIENTS, M]: what multiplies what (csrc/numerics/gradient.h);
# dz/dx's constant factor is in them already.
#   d = e 1[v=y] + p (a0 + ent (lp + ent_value) + col (p - col_value) + rkl (lp - lr - rkl_value)
#         + ev (A - ev_value) + tv (sign(p - r) - tv_mean) - jsd (log(m / p) + jsd_kl))
#       + fkl (p - r) + alpha (exp(lp + a (lr - lp)) - p)
#       + renyi (exp(lp + a (lr - lp) - renyi_shift) - p) + mix (exp(z + b (zr - z) - mix_lse) - p)
#       + bkl (p - (r inside the top set, p bkl_ratio outside))
# A = given values, or (za - aux_lse) - lr. A term whose coefficient is 0 must not be formed (it may
# be infinite), and p = 0 makes the product with the bracket 0.
COEFFICIENTS = (
    "lse", "lse_low", "e", "a0",
    "ent", "ent_value", "col", "col_value",
    "ref_lse", "ref_lse_low", "fkl", "rkl", "rkl_value",
    "ev", "ev_value", "aux_lse", "alpha", "renyi", "renyi_shift", "mix", "mix_lse", "mix_lse_low",
    "jsd", "jsd_kl", "tv", "tv_mean", "bkl", "bkl_ratio", "top_value", "top_index",
)  # fmt: skip

# Scalars [PARAMS] in the fold dtype: factor and top of the policy, of the reference and third head
# (top 0: no cap), slope = temperature / softcap of the policy (dz/dx = constant (1 - (slope z)^2)),
# and the parameters of alpha, renyi, mix, jsd (0 where not asked for).
PARAMS = (
    "factor", "top", "ref_factor", "ref_top", "slope", "alpha", "renyi", "mix", "jsd",
)  # fmt: skip

# Rows of head weights summed in the forward of a frozen head, x relative to the row's maximum so
# far: sum e W, sum e x W, sum er W, sum e (x - xr) W, each term times 1 - (slope z)^2.
FACTORS = ("mass", "log", "ref", "cross")


class LogitOptions(NamedTuple):
    """z = softcap * tanh(scale * (x + bias) / softcap) / temperature of one model."""

    scale: float
    softcap: float | None
    temperature: float
    bias: Tensor | None = None  # [V], any float dtype

    def factor(self) -> float:
        return self.scale / (self.temperature if self.softcap is None else self.softcap)

    def top(self) -> float:
        return 0.0 if self.softcap is None else self.softcap / self.temperature

    def slope(self) -> float:
        return 0.0 if self.softcap is None else self.temperature / self.softcap


@dataclass(frozen=True)
class Call:
    """One op call as the kernels see it."""

    stats: tuple[Stat, ...]
    policy: LogitOptions
    ref: LogitOptions | None  # None: one model
    aux: LogitOptions | None  # third head
    V: int
    working: torch.dtype  # hidden's, or the logits'
    wide: bool  # products come in fp32 although the working dtype has 16 bits
    targets: Tensor  # [M] int64, -1 in rows that do not count: read nothing there, write 0
    params: Tensor  # [PARAMS]
    small: bool  # the small fold and gradient serve it
    ev: str  # source of ev's A: "" (not asked for), "values", "aux"
    # A backward that reads rounded products may follow (never with a frozen head).
    rounds: bool

    def has(self, name: str) -> bool:
        return any(s.name == name for s in self.stats)

    def param(self, name: str) -> float:
        return next((s.param or 0.0 for s in self.stats if s.name == name), 0.0)

    @property
    def fold_dtype(self) -> torch.dtype:
        return torch.float64 if self.working == torch.float64 else torch.float32

    @property
    def fields(self) -> tuple[str, ...]:
        if self.ref is None:
            return ONE_MODEL_FIELDS[: SMALL_ONE_MODEL if self.small else None]
        return TWO_MODEL_FIELDS[: SMALL_TWO_MODEL if self.small else None]


@dataclass(frozen=True)
class Tile:
    """Raw products of rows [r0, r0 + m) and columns [v0, v0 + w); last dimension contiguous."""

    r0: int
    v0: int
    z: Tensor  # [m, w] working or fold dtype
    zr: Tensor | None = None
    za: Tensor | None = None
    adv: Tensor | None = None  # A of `ev`: [w] (one for all rows) or [m, w], fold dtype
    # Where the fold also writes the products rounded to the working dtype (policy, reference).
    keep: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def rows(self) -> slice:
        return slice(self.r0, self.r0 + self.z.shape[0])


class Epilogue(Protocol):
    """Kernels of one backend. Every tensor is on one device, on torch's current stream; no function
    synchronises, and each is safe under graph capture."""

    def chunk_columns(self, call: Call) -> int:
        """Columns of one chunk, a power of two of at most 4096 and the same for every tile of a
        call. Tiles are as wide as a multiple of it, the vocabulary's last tile may be narrower."""
        ...

    def fold(self, call: Call, tile: Tile, fields: Tensor, at_target: Tensor) -> None:
        """ONE read of each tile: writes fields [F, chunks of this tile, m] (a strided view, last
        dimension contiguous) and `tile.keep`; at_target [2, m] gets z_y (and zr_y) of the rows
        whose target lies in this tile and is left alone elsewhere."""
        ...

    def fold_second(self, call: Call, tile: Tile, norms: Tensor, fields: Tensor) -> None:
        """Second sweep (jsd, tv, bkl): norms [NORMS, m], fields [SECOND_FIELDS, chunks, m]."""
        ...

    def seen(self, call: Call, zr: Tensor, v0: int, out: Tensor) -> None:
        """out [m, w] (fold dtype) = reference logits of products rounded to the working dtype, as
        the second sweep and the gradient compare them with the top set."""
        ...

    def factor(self, call: Call, tile: Tile, maxima: Tensor, name: str, out: Tensor) -> None:
        """Frozen head: out [m, w] in the working dtype = the terms that multiply W in the sum
        `name` (FACTORS); maxima [2, m] of policy and reference, finite."""
        ...

    def raise_rows(self, names: tuple[str, ...], totals: Tensor, shift: Tensor) -> None:
        """Frozen head: moves totals [len(names), m, D] to larger maxima; shift [4, m] = fp, fr, dp,
        dr in totals' dtype. With the mass t0 before the move: mass = fp t0, log = fp (log + dp t0),
        ref = fr ref, cross = fp (cross + (dp - dr) t0). A row with fp = fr = 1 and dp = dr = 0 is
        not touched. names[0] is always "mass"."""
        ...

    def gradient(self, call: Call, tile: Tile, coefficients: Tensor, dx: Tensor) -> None:
        """ONE read of each tile, ONE write of dx [m, w] = dL/dx in the working dtype, products read
        as rounded to the working dtype; coefficients [COEFFICIENTS, m]. dx may be tile.z itself."""
        ...
