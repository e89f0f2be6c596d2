"""Statistics of next-token distributions: the records that hold them and their names.

Shapes: N packed tokens, S sequences. Log-probabilities and divergences are in nats everywhere.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of the next-token distribution, one number per token; None where not asked for.

    Every field has the shape of `targets`. Names and definitions: p is the policy, r the reference,
    y the target, z the logits.
    """

    logp: Tensor | None = None  # log p_y
    lse: Tensor | None = None  # log sum_v exp z_v
    zy: Tensor | None = None  # z_y
    ent: Tensor | None = None  # -sum_v p_v log p_v
    col: Tensor | None = None  # log sum_v p_v^2
    top1: Tensor | None = None  # 1 where argmax z == y (ties: lower index), else 0; no gradient
    zmean: Tensor | None = None  # mean of the finite logits; no gradient
    ref_logp: Tensor | None = None  # log r_y; constant
    ref_lse: Tensor | None = None  # log-normaliser of the reference; constant
    fkl: Tensor | None = None  # KL(r || p)
    rkl: Tensor | None = None  # KL(p || r)
    jsd: Tensor | None = None  # b KL(r || m) + (1-b) KL(p || m), m = b r + (1-b) p
    alpha: Tensor | None = None  # (1 - S_a) / (a (1-a)), S_a = sum_v r_v^a p_v^(1-a)
    renyi: Tensor | None = None  # log S_a / (a - 1)
    tv: Tensor | None = None  # 1/2 sum_v |p_v - r_v|
    bkl: Tensor | None = None  # KL(r || p) over {top k of r} plus one rest bucket
    mix: Tensor | None = None  # log softmax((1-b) z + b z_ref)_y
    ev: Tensor | None = None  # sum_v p_v A_v
    xent: Tensor | None = None  # sum_k q_k log p_k over a sparse teacher q
    # with tail_mass: share of the vocabulary's chunks that the backward computes; no gradient
    active: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> TokenStats:
        """The record of fn(field) for every field that is there."""
        return TokenStats(*(None if f is None else fn(f) for f in self))


class SeqStats(NamedTuple):
    """Weighted sums of token statistics over each sequence, fp64, plus the unweighted token count.

    `logp` is the sum of the token log-probabilities of a sequence [S] (nats), `fkl` the sequence
    KL(reference || policy), and so on. Fields not asked for are None.
    """

    logp: Tensor | None = None
    ref_logp: Tensor | None = None
    length: Tensor | None = None  # scored tokens, unweighted
    fkl: Tensor | None = None
    rkl: Tensor | None = None
    jsd: Tensor | None = None
    alpha: Tensor | None = None
    renyi: Tensor | None = None
    tv: Tensor | None = None
    bkl: Tensor | None = None
    mix: Tensor | None = None
    ev: Tensor | None = None
    lse: Tensor | None = None
    zy: Tensor | None = None
    ent: Tensor | None = None
    col: Tensor | None = None
    top1: Tensor | None = None
    zmean: Tensor | None = None
    ref_lse: Tensor | None = None
    xent: Tensor | None = None

    def require(self, name: str) -> Tensor:
        """The field `name` [S]; raises ValueError when it was not computed."""
        value = getattr(self, name)
        if value is None:
            have = [f for f in self._fields if getattr(self, f) is not None]
            raise ValueError(
                f"this loss needs the sequence statistic {name!r} [S], but only {have} are there; "
                f"ask the ops for it (stats=(..., {name!r})) or pass it when building SeqStats."
            )
        return value

    @property
    def logratio(self) -> Tensor:  # [S]
        """log p(sequence) - log r(sequence)."""
        return self.require("logp") - self.require("ref_logp")

    @property
    def mean_logp(self) -> Tensor:  # [S]
        """Log-probability per scored token; 0 for an empty sequence."""
        return self.require("logp") / self.require("length").clamp(min=1)

    @property
    def mean_logratio(self) -> Tensor:  # [S]
        """Log-ratio per scored token; 0 for an empty sequence."""
        return self.logratio / self.require("length").clamp(min=1)

    def map(self, fn: Callable[[Tensor], Tensor]) -> SeqStats:
        """The record of fn(field) for every field that is there."""
        return SeqStats(*(None if f is None else fn(f) for f in self))

    # the public method hides tuple.index
    def index(self, rows: Tensor | slice) -> SeqStats:  # type: ignore[override]
        """The same record for the chosen sequences (a slice or an index tensor)."""
        return self.map(lambda field: field[rows])


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which statistics and losses of such inputs come back: fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Stat(NamedTuple):
    """One requested statistic: field name and its parameter (None where it has none)."""

    name: str
    param: float | None

    def __str__(self) -> str:
        if self.param is None:
            return self.name
        return f"{self.name}:{int(self.param) if self.name == 'bkl' else repr(self.param)}"


ONE_MODEL_STATS = ("logp", "lse", "zy", "ent", "col", "top1", "zmean", "xent")
TWO_MODEL_STATS = (
    "ref_logp", "ref_lse", "fkl", "rkl", "jsd", "alpha", "renyi", "tv", "bkl", "mix", "ev",
)  # fmt: skip
NO_GRADIENT = frozenset({"top1", "zmean", "ref_logp", "ref_lse"})
# Statistics whose logit gradient is made of the policy's own probabilities: in 16 bits it may
# read rounded logits, whose error then stays that of one rounding. All others are differences (of
# two distributions; col of p and its mean, where rounded logits put 4 % on peaked rows) or hold a
# log-probability, and read fp32 products.
OWN_PROBABILITY = frozenset({"logp", "lse", "zy", "xent"})
# Statistics whose logit gradient over a set of columns is bounded in L1 by the masses P and R of p
# and r there, per unit of upstream gradient: logp, lse P; zy 0; xent P times the teacher's mass;
# fkl P + R. So a backward may skip columns of small mass (`tail_mass`).
TAIL_STATS = frozenset({"logp", "lse", "zy", "xent", "fkl"})
# Statistics whose logit gradient is a fixed row times one number, formed in the forward when the
# head is frozen (jsd, tv need a second sweep for that row and are recomputed instead).
FROZEN_STATS = frozenset({"logp", "lse", "zy", "ent", "fkl", "rkl"}) | NO_GRADIENT
_PARAM_RANGE = {
    "jsd": ("weight of the reference in the mixture, 0 < b < 1", 0.0, 1.0),
    "alpha": ("exponent of the reference, 0 < a < 1", 0.0, 1.0),
    "renyi": ("order, 0 < a < 1", 0.0, 1.0),
    "mix": ("weight of the reference logits, finite and b <= 1", -math.inf, 1.0),
    "bkl": ("size of the reference's top set, k >= 1", 0.0, math.inf),
}


def parse_stats(stats: str | Iterable[str], *, allowed: Sequence[str]) -> tuple[Stat, ...]:
    """Validates statistic names such as ("logp", "jsd:0.5"); one parameter per field and call.

    Raises:
        ValueError: unknown name (nearest names given), missing or superfluous parameter, a
            parameter out of range, a field asked for twice with different parameters.
    """
    if isinstance(stats, str):
        stats = (stats,)
    if not isinstance(stats, Iterable) or isinstance(stats, Tensor):
        raise ValueError(f"stats must be a name or several, got {stats!r}; as in stats=('logp',).")
    found: dict[str, Stat] = {}
    for text in stats:
        name, _, raw = str(text).partition(":")
        if name not in allowed:
            if name in TWO_MODEL_STATS:
                hint = "it compares two models: use linear_divergence (or give ref_logits)"
            else:
                near = difflib.get_close_matches(name, allowed, n=3) or list(allowed)
                hint = "nearest: " + ", ".join(near)
            raise ValueError(
                f"stats must name statistics among {tuple(allowed)}, got {text!r}; {hint}."
            )
        if name in _PARAM_RANGE:
            what, low, high = _PARAM_RANGE[name]
            try:
                param = float(raw)
            except ValueError:
                raise ValueError(
                    f"statistic {name!r} needs a parameter ({what}), got {text!r}; write it as "
                    f"{name}:0.5."
                ) from None
            if name == "mix":
                good = low < param <= high
            elif name == "bkl":
                good = 1 <= param < math.inf and param == int(param)
            else:
                good = low < param < high
            if not good:
                raise ValueError(f"the parameter of {name!r} must be: {what}; got {text!r}.")
            stat = Stat(name, param)
        elif raw:
            raise ValueError(
                f"statistic {name!r} takes no parameter, got {text!r}; write {name!r}."
            )
        else:
            stat = Stat(name, None)
        if found.setdefault(name, stat) != stat:
            raise ValueError(
                f"one parameter per field and call: got {found[name]} and {stat}; "
                "call the op twice to have both."
            )
    if not found:
        raise ValueError("stats must name at least one statistic, got none; pass stats=('logp',).")
    return tuple(found.values())
