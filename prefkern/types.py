"""Records that the parts of prefkern exchange: statistics, loss declarations, backend problems.

Shapes: N packed tokens, S sequences, V vocabulary entries, D hidden size. Log-probabilities and
divergences are in nats everywhere.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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

    # the public method hides tuple.index
    def index(self, rows: Tensor | slice) -> SeqStats:  # type: ignore[override]
        """The same record for the chosen sequences (a slice or an index tensor)."""
        return SeqStats(*(None if f is None else f[rows] for f in self))


class Stat(NamedTuple):
    """One requested statistic: field name and its parameter (None where it has none)."""

    name: str
    param: float | None

    def __str__(self) -> str:
        if self.param is None:
            return self.name
        return f"{self.name}:{int(self.param) if self.name == 'bkl' else repr(self.param)}"


ONE_MODEL_STATS = ("logp", "lse", "zy", "ent", "col", "top1", "zmean")
TWO_MODEL_STATS = (
    "ref_logp", "ref_lse", "fkl", "rkl", "jsd", "alpha", "renyi", "tv", "bkl", "mix", "ev",
)  # fmt: skip
# Rows of per-token numbers the two-model forward hands to its backward (lse, ref_lse, ...); their
# meaning is private to a backend.
SAVED_ROWS = 10
NO_GRADIENT = frozenset({"top1", "zmean", "ref_logp", "ref_lse"})
# Statistics whose logit gradient is a fixed row times one number, formed in the forward when the
# head is frozen (jsd, tv need a second sweep for that row and are recomputed instead).
FROZEN_STATS = frozenset({"logp", "lse", "zy", "ent", "fkl", "rkl"}) | NO_GRADIENT
_PARAM_RANGE = {
    "jsd": ("weight of the reference in the mixture, 0 < b < 1", 0.0, 1.0),
    "alpha": ("exponent of the reference, 0 < a < 1", 0.0, 1.0),
    "renyi": ("order, 0 < a < 1", 0.0, 1.0),
    "mix": ("weight of the reference logits, 0 <= b <= 1", -math.inf, math.inf),
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
                good = 0.0 <= param <= 1.0
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


@dataclass(frozen=True)
class Problem:
    """One op call, as far as the choice of a backend depends on it."""

    op: str
    device: str  # device type, e.g. "cpu"
    dtype: torch.dtype  # compute dtype
    weight_dtype: torch.dtype | None = None
    stats: tuple[str, ...] = ()
    N: int | None = None
    V: int | None = None
    D: int | None = None
    family: str | None = None  # list_rank only

    def __str__(self) -> str:
        shape = ", ".join(
            f"{k}={v}" for k in ("N", "V", "D") if (v := getattr(self, k)) is not None
        )
        text = f"{self.op} on {self.device}, {str(self.dtype).removeprefix('torch.')}"
        if self.weight_dtype not in (None, self.dtype):
            text += f" (head {str(self.weight_dtype).removeprefix('torch.')})"
        if shape:
            text += f", {shape}"
        if self.stats:
            text += f", stats={','.join(self.stats)}"
        if self.family:
            text += f", family={self.family}"
        return text


class Backend(Protocol):
    """What a backend module offers (documentation only; nobody inherits from it).

    Beside `unsupported`, a module has `<op>_fwd` and `<op>_bwd` for every op it serves, with the
    signatures of the functions in `prefkern.reference`. It may have `held_back(problem)`: reasons
    why automatic choice passes over it although it can serve the problem.
    """

    def unsupported(self, problem: Problem) -> list[str]:
        """Reasons why this backend cannot serve `problem`; empty when it can."""
        ...


class TokenWeights(NamedTuple):
    """What a weight stage returns.

    `weights` is one [N] tensor for every statistic or a dict statistic -> [N]; a missing key means
    weight 1, and "logp" weighs `ref_logp` too (log-ratios are weighted as differences). `penalty`
    [S] fp64 is added to the loss over the loss's own denominator.
    """

    weights: Tensor | dict[str, Tensor]
    penalty: Tensor | None = None


class WeightStage(NamedTuple):
    """Token weights that a loss asks for: a function of prefkern.token_weights or
    prefkern.contrast_weights, called by name.

    `given` names the arguments preference_loss supplies (cu_seqlens [S+1], scored [N] bool,
    sign [N] +1 chosen / -1 rejected, public_length [S], ref_logp [N], logp [N] detached), `extra`
    the tensors the caller must pass. Other parameters are hyper-parameters with defaults.
    """

    fn: Callable[..., TokenWeights]
    given: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


class Supervised(NamedTuple):
    """A likelihood term that preference_loss adds: weight * NLL(rows) with its own denominator.

    mode "token": sum of NLL over the number of tokens; "seq": mean over sequences of NLL / length;
    "sum": mean over sequences of NLL.
    """

    argument: str  # name of the weight among the loss arguments
    default: float
    rows: str = "chosen"
    mode: str = "token"
    scale: str | None = None  # a hyper-parameter that multiplies the weight


@dataclass(frozen=True)
class Loss:
    """Declaration of a loss: the pure function and what it must be fed.

    A record is called like its function; a ValueError then names the loss, and the first call of a
    provisional one warns. `stats` are the token statistics the loss reads through SeqStats (or
    TokenStats); `ref_logp` follows from `needs_reference`.
    """

    fn: Callable[..., Any]
    name: str
    family: str  # folder: pairwise, pointwise, listwise, tokenwise, diffusion
    stats: tuple[str, ...] = ("logp",)
    needs_reference: bool = False
    extra: tuple[str, ...] = ()  # keyword tensors a caller must supply
    status: str = ""  # how the formula is known
    source: str = ""  # paper and equation
    rows: tuple[str, ...] = ("chosen", "rejected")  # pairwise: the sequences of one group, in order
    score: str = "logratio"  # listwise: SeqStats property handed over as `scores`
    weights: WeightStage | None = None
    supervised: Supervised | None = None
    stats_for: Callable[..., tuple[str, ...]] | None = None  # stats that depend on hyper-parameters
    rewards: Callable[..., Tensor] | None = None  # rewards(seq, **hyper), what metrics log
    logps: str = "logp"  # SeqStats property logged as logps/*
    update: Callable[..., Any] | None = None  # stateful losses: update(state, ...) -> state
    # Denominator of preference_loss where it is not the family's own (pairs, sequences, groups).
    items: str = ""
    reference_weight: str = ""  # hyper-parameter that, at 0, makes the reference superfluous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.warn_if_provisional()
        try:
            return self.fn(*args, **kwargs)
        except ValueError as error:
            raise ValueError(f"loss {self.name!r}: {error}") from error

    @property
    def provisional(self) -> bool:
        """True where the formula is not known to be the method's."""
        return self.status.startswith("provisional")

    def warn_if_provisional(self) -> None:
        """Once per loss and process; not while tracing, where a warning would end the graph."""
        if not self.provisional or torch.compiler.is_compiling() or self.name in _warned:
            return
        _warned.add(self.name)
        warnings.warn(
            f"loss {self.name!r} is {self.status}. Its formula was not checked against "
            f"{self.source}; do not report its results as that method's.",
            stacklevel=3,
        )


_warned: set[str] = set()  # names of the provisional losses that have said so
