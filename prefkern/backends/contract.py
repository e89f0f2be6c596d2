"""What the ops and the backends exchange: one record down, sums and gradients up.

Shapes: N tokens, M computed rows, V vocabulary, D hidden size, r rank of the low-rank terms, n
statistics, C chunks of the vocabulary. Numbers per row are laid out as prefkern.backends.tables
says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..stats import stat_dtype
from . import tables
from .plan import Plan, ShardPlan, read_plan

SHORT = (torch.bfloat16, torch.float16)
# These are single logits, or sums whose error stays that of one rounding.
FOLDED_ROUNDED = frozenset({"logp", "lse", "zy", "top1", "zmean", "xent"})


class Model(NamedTuple):
    """One model of a call: hidden states and head, or logits that exist already.

    z = softcap * tanh(scale * (hidden @ weight.T + low_in @ low_out.T + bias) / softcap) /
    temperature; softcap 0 is none.
    """

    hidden: Tensor | None = None  # [N, D], the compute dtype
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]
    low_in: Tensor | None = None  # [N, r], the compute dtype
    low_out: Tensor | None = None  # [V, r]
    logits: Tensor | None = None  # [N, V] instead of hidden and weight
    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0

    @property
    def vocabulary(self) -> int:
        if self.logits is not None:
            return self.logits.shape[1]
        assert self.weight is not None
        return self.weight.shape[0]


class HeadCall(NamedTuple):
    """One call of a head op: everything a backend needs, forward and backward."""

    policy: Model
    ref: Model | None
    aux: Model | None
    targets: Tensor  # [N] int64
    # [M] int64: the rows to compute, all scored. None: all N, of which ignored ones are left out.
    rows: Tensor | None
    values: Tensor | None  # [V], or [N, k] with values_index: A of ev, or the teacher of xent
    values_index: Tensor | None  # [N, k] int64
    ignore_index: int
    plan: Plan

    @property
    def models(self) -> list[Model]:
        return [m for m in (self.policy, self.ref, self.aux) if m is not None]

    @property
    def working(self) -> torch.dtype:
        """The compute dtype of the products, or the logits' own."""
        data = self.policy.hidden if self.policy.logits is None else self.policy.logits
        assert data is not None
        return data.dtype

    @property
    def fold_dtype(self) -> torch.dtype:
        return stat_dtype(self.working)

    @property
    def given(self) -> bool:
        """True where logits exist already: nothing is multiplied, nothing is rounded."""
        return self.policy.logits is not None

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.fold_dtype if self.plan.exact else self.working

    @property
    def kept_models(self) -> int:
        """Models whose products the cache holds: those that the backward reads, and both where a
        second sweep can read them."""
        again = self.plan.second and self.cache_dtype == self.fold_dtype
        return 2 if self.plan.reads_reference or again else 1

    @property
    def rounds(self) -> bool:
        """The backward reads products rounded to 16 bits, kept or recomputed. A fold of unrounded
        ones then forms the normaliser of the rounded ones too: with its own, the gradient of a
        token with p = 0.99 would be lost in the 2^-9 |z| by which its probability is off. Not where
        no backward follows."""
        short = self.working in SHORT and not self.given
        return short and not self.plan.exact and not self.plan.frozen and self.plan.moves

    @property
    def wide(self) -> bool:
        """Products of 16-bit operands are folded before any rounding: a KL of rounded logits would
        be off by half."""
        names = {s.name for s in self.plan.stats}
        return self.working in SHORT and not self.given and not names <= FOLDED_ROUNDED

    @property
    def N(self) -> int:
        return self.targets.shape[0]

    @property
    def M(self) -> int:
        return self.N if self.rows is None else self.rows.shape[0]

    @property
    def V(self) -> int:
        """Rows of the heads at hand."""
        return self.policy.vocabulary

    @property
    def shard(self) -> ShardPlan | None:
        return self.plan.shard

    @property
    def chunks(self) -> int:
        """Chunks of the heads at hand."""
        return -(-self.V // tables.CHUNK)

    @property
    def total(self) -> int:
        """Size of the vocabulary, of which other ranks may hold a part."""
        return self.V if self.shard is None else self.shard.total

    def present(self) -> tuple[str, ...]:
        """Names of the tensors of the record, in their order in a list."""
        return tuple(n for n in tables.TENSORS if self._tensor(n) is not None)

    def pack(self) -> tuple[list[Tensor], list[float]]:
        """(tensors in the order of plan.tensors, numbers in the order of tables.NUMBERS)."""
        found = [x for n in self.plan.tensors if (x := self._tensor(n)) is not None]
        numbers: list[float] = []
        for m in self[:3]:
            numbers += (1.0, 0.0, 1.0) if m is None else (m.scale, m.softcap, m.temperature)
        return found, numbers

    def _tensor(self, name: str) -> Tensor | None:
        owner, field = _PLACES[name]
        if owner is None:
            return getattr(self, field)
        model = (self.policy, self.ref, self.aux)[owner]
        return None if model is None else getattr(model, Model._fields[field])


# Of a tensor by its name in a record: (which model, its field), or (None, a field of the call).
_PLACES: dict[str, tuple[int | None, Any]] = {
    prefix + name: (i, field)
    for i, prefix in enumerate(("", "ref_", "aux_"))
    for field, name in enumerate(Model._fields[:6])
} | {name: (None, name) for name in ("targets", "rows", "values", "values_index")}


def unpack(tensors: list[Tensor], numbers: list[float], plan: str, ignore_index: int) -> HeadCall:
    """The record from what `HeadCall.pack` made of it."""
    read = read_plan(plan)
    models: list[list[Any]] = [[None] * 6 for _ in range(3)]
    found: dict[str, Tensor] = {}
    for name, tensor in zip(read.tensors, tensors, strict=True):
        owner, field = _PLACES[name]
        if owner is None:
            found[field] = tensor
        else:
            models[owner][field] = tensor
    policy, ref, aux = (
        None if own[0] is None and own[5] is None else Model(*own, *numbers[3 * i : 3 * i + 3])
        for i, own in enumerate(models)
    )
    assert policy is not None
    return HeadCall(
        policy, ref, aux, found["targets"], found.get("rows"), found.get("values"),
        found.get("values_index"), ignore_index, read,
    )  # fmt: skip


class Folded(NamedTuple):
    """What a fold gathers. Sums of several ranges of the vocabulary merge by `Arithmetic.merge`."""

    sums: Tensor  # [FIELDS, M] float64
    at: Tensor  # [AT, M] float64
    cache: Tensor  # [kept_models, kept, V] raw products of the first `kept` computed rows
    factors: Tensor  # [plan.factors, M, D] fold dtype, relative to the maxima in sums; [0] if none
    rounded: bool = False  # sums hold round_max and round_sum
    # [2, k, M] float64: the reference's k largest logits and their columns, bkl's top set, in
    # descending order and equal ones by column, so that the last is the threshold; of a whole
    # vocabulary the last may stand alone [2, 1, M]
    top: Tensor | None = None
    chunks: Tensor | None = None  # [tail_models, C, M] fp32 log-sum-exp of every chunk, plan.tail


class Tail(NamedTuple):
    """What a backward does with the units of a call."""

    active: Tensor  # [C, M] bool: units that it computes
    # [C, D + r + 1] fold dtype: what every row of a chunk gets of the skipped units, in d weight,
    # d low_out and d bias; None where none of them is needed
    spread: Tensor | None


def written(plan: Plan, rounded: bool) -> tuple[str, ...]:
    """Fields that a fold of such a call writes."""
    pairs = [("round_max", rounded), ("round_sum", rounded)]
    pairs += [("ref_max", plan.two_models), ("ref_sum", plan.two_models)]
    pairs += [("ref_cross", plan.has("fkl")), ("pol_cross", plan.has("rkl"))]
    pairs += [("x", plan.has("ent")), ("sq", plan.has("col")), ("top", plan.has("top1"))]
    pairs += [("z_sum", plan.has("zmean")), ("z_count", plan.has("zmean"))]
    for name in ("alpha", "renyi", "mix"):
        pairs += [(f"{name}_max", plan.has(name)), (f"{name}_sum", plan.has(name))]
    third = plan.ev == "aux"
    pairs += [("adv", plan.ev != ""), ("aux_max", third), ("aux_sum", third)]
    return ("max", "sum", *(name for name, on in pairs if on))


class Gradients(NamedTuple):
    """Of the policy; None where not needed."""

    hidden: Tensor | None = None  # [N, D]
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]
    low_in: Tensor | None = None  # [N, r]
    low_out: Tensor | None = None  # [V, r]
    logits: Tensor | None = None  # [N, V]


class Arithmetic(Protocol):
    """Numbers per row: sums to statistics, gradients to coefficients (documentation only). Written
    once in eager PyTorch (backends/eager/finish.py) and once natively (csrc/numerics/finish.h)."""

    def merge(self, call: HeadCall, fields: Tensor, starts: Tensor, rounded: bool) -> Tensor:
        """[FIELDS, C, M] of C ranges that begin at column starts [C] -> [FIELDS, M] float64. Fields
        that `written` does not name may hold anything and become 0."""
        ...

    def norms(self, call: HeadCall, folded: Folded) -> Tensor:
        """[NORMS, M] in the fold dtype, for the second sweep."""
        ...

    def finish(
        self, call: HeadCall, folded: Folded, second: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(values [n, M] in the fold dtype, saved [SAVED, M] float64) from the sums of both
        sweeps; second [SECOND, M] float64. A target outside [0, V) that is not ignored gives NaN,
        ignored rows 0."""
        ...

    def pull(self, call: HeadCall, d_out: Tensor, out: Tensor, saved: Tensor) -> Tensor:
        """[COEFFICIENTS, M] in the fold dtype from d_out, out [n, M] and saved; 0 in ignored
        rows."""
        ...


class Backend(Protocol):
    """What a backend module offers (documentation only; nobody inherits from it).

    Beside the functions below a module has `arithmetic` (the `Arithmetic` of its devices), and
    `COMPACTS`: whether it leaves ignored rows out by itself, so that no list of rows is made for
    it, and `FOLDS_WIDE`: whether it folds products of 16-bit operands unrounded also where
    `HeadCall.wide` does not ask for it. It may have `held_back(problem)`: reasons why automatic
    choice passes over it although it can serve the problem. It may have `forward` (fold to finish)
    and `backward` (pull and unfold): the same numbers for `Plan.whole` calls in one step each, from
    the packed record, with less for the host to do in small calls; they refuse labels out of range
    by a RuntimeError. Ops outside the head (list_rank, segment_sum, error_sum) are functions
    `<op>_fwd` and `<op>_bwd` with the signatures of those in prefkern.backends.eager.
    """

    COMPACTS: bool
    FOLDS_WIDE: bool
    # It may have PICKS_SCHEME = True, beside `forward` and `backward`: a call with a tail whose
    # head is frozen looks at some rows first, and takes the frozen scheme where nearly all their
    # units are needed.
    # It may have KEEPS_UNITS = False: with a tail its products are of other rows and have other
    # bits, so its backward reads nothing that was kept, and nothing is.

    def fold(self, call: HeadCall, kept: int) -> Folded:
        """The first sweep over the vocabulary."""
        ...

    def fold_again(self, call: HeadCall, norms: Tensor, cache: Tensor) -> Tensor:
        """The second sweep: [SECOND, M] float64. Products that the cache holds are not made
        again."""
        ...

    def unfold(
        self,
        call: HeadCall,
        coefficients: Tensor,
        cache: Tensor,
        needed: frozenset[str],
        tail: Tail | None,
    ) -> Gradients:
        """Coefficients [COEFFICIENTS, M] -> gradients of the fields of `Gradients` named. With a
        tail, units that are not active are neither recomputed nor multiplied, and `spread` is added
        to the rows of their chunks before the results are rounded."""
        ...

    def unsupported(self, problem: Problem) -> list[str]:
        """Reasons why this backend cannot serve `problem`; empty when it can."""
        ...


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
    index: int | None = None  # which device of its type the tensors are on; None: the current one

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
        return text
