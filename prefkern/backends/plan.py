"""The part of a call that is not a tensor, as text and read: statistics, flags, which tensors."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..stats import (
    NO_GRADIENT,
    ONE_MODEL_STATS,
    OWN_PROBABILITY,
    TWO_MODEL_STATS,
    Stat,
    parse_stats,
)
from . import tables


class ShardPlan(NamedTuple):
    """Which rows of a vocabulary of `total` this rank's heads hold, and with whom they share it."""

    group: str  # name of the process group
    rank: int
    starts: tuple[int, ...]  # first row of every rank
    total: int
    tokens: str  # "same": all ranks score the same tokens; "own", "sequence": each its own

    @property
    def world(self) -> int:
        return len(self.starts)

    @property
    def start(self) -> int:
        return self.starts[self.rank]


class Plan(NamedTuple):
    """The part of a call that is not a tensor, as text: statistics, flags, and which tensors there
    are. Equal texts give the same object."""

    stats: tuple[Stat, ...]
    no_grad: frozenset[str]  # statistics that are reported and never differentiated
    exact: bool  # the backward reads fp32 products, kept or recomputed
    frozen: bool  # the forward keeps sums of head rows, the backward makes no product
    tensors: tuple[str, ...]  # names, in the order of the list
    tail: float  # probability mass of a row whose units the backward may skip; 0: none
    either: bool  # with a tail: the frozen scheme would serve the call too
    shard: ShardPlan | None  # of heads that several ranks hold
    text: str  # what it was read from, for native code

    def has(self, name: str) -> bool:
        return any(s.name == name for s in self.stats)

    def param(self, name: str) -> float:
        """The parameter of a statistic, 0 where it was not asked for."""
        return next((s.param or 0.0 for s in self.stats if s.name == name), 0.0)

    def grows(self, name: str) -> bool:
        """True where the statistic was asked for and has a gradient."""
        return self.has(name) and name not in self.no_grad and name not in NO_GRADIENT

    @property
    def moves(self) -> bool:
        """True where a gradient may come back for some statistic."""
        return any(self.grows(s.name) for s in self.stats)

    @property
    def two_models(self) -> bool:
        return any(name.startswith("ref_") for name in self.tensors)

    @property
    def second(self) -> bool:
        """jsd, tv and bkl need both normalisers before their sweep."""
        return self.has("jsd") or self.has("tv") or self.has("bkl")

    @property
    def ev(self) -> str:
        """Source of ev's A: "values", "aux", or "" where it was not asked for."""
        if not self.has("ev"):
            return ""
        return "aux" if "aux_hidden" in self.tensors else "values"

    @property
    def tail_models(self) -> int:
        """Models whose chunk masses the choice of units reads: the reference's where r stands in
        the logit gradient."""
        return 2 if self.grows("fkl") else 1

    @property
    def reads_reference(self) -> bool:
        """The logit gradient holds the reference's probabilities."""
        names = ("fkl", "rkl", "jsd", "alpha", "renyi", "tv", "bkl", "mix")
        return any(map(self.grows, names)) or (self.ev == "aux" and self.grows("ev"))

    @property
    def one_pass(self) -> Plan:
        """The same call in the frozen scheme, which skips nothing."""
        plain = write_plan(self.stats, self.no_grad, self.tensors, short=False, frozen=True)
        return read_plan(plain)

    @property
    def whole(self) -> bool:
        """One step may take such a call from its record to its results: every column of the head is
        here, and the backend finds its rows."""
        return self.shard is None and self.tail == 0.0 and "rows" not in self.tensors

    @property
    def saved_rows(self) -> int:
        return len(tables.SAVED) if self.two_models else tables.SAVED_ONE_MODEL

    @property
    def factors(self) -> tuple[str, ...]:
        """Sums of head rows that a frozen head's gradient is made of."""
        if not self.frozen:
            return ()
        wanted = {"log": "ent", "gap": "fkl", "cross": "rkl"}
        return tuple(f for f in tables.FACTORS if f == "mass" or self.grows(wanted[f]))


def read_plan(text: str) -> Plan:
    """From `write_plan`'s text."""
    return _parse(text) if torch.compiler.is_compiling() else _remembered(text)


def _parse(text: str) -> Plan:
    stats, no_grad, marks, tensors, *shard = text.split(";")
    flags = {name: value for name, _, value in (mark.partition(":") for mark in marks.split(","))}
    return Plan(
        parse_stats(stats.split(","), allowed=ONE_MODEL_STATS + TWO_MODEL_STATS),
        frozenset(filter(None, no_grad.split(","))),
        "exact" in flags,
        "frozen" in flags,
        tuple(tensors.split(",")),
        float(flags.get("tail", 0.0)),
        "either" in flags,
        read_shard(shard[0]) if shard else None,
        text,
    )


_remembered = functools.lru_cache(maxsize=512)(_parse)


def write_shard(shard: ShardPlan) -> str:
    starts = ":".join(map(str, shard.starts))
    return ",".join((shard.group, str(shard.rank), starts, str(shard.total), shard.tokens))


def read_shard(text: str) -> ShardPlan:
    """From `write_shard`'s text."""
    group, rank, starts, total, tokens = text.split(",")
    places = tuple(int(x) for x in starts.split(":"))
    return ShardPlan(group, int(rank), places, int(total), tokens)


def write_plan(
    stats: tuple[Stat, ...],
    no_grad: frozenset[str],
    tensors: tuple[str, ...],
    *,
    short: bool,
    frozen: bool = False,
    tail: float = 0.0,
    either: bool = False,
    shard: ShardPlan | None = None,
) -> str:
    """statistics;without gradient;flags;tensors[;shard], each joined by commas. `short`: the
    compute dtype has 16 bits, so that products are rounded unless a gradient forbids it. Such a
    gradient is not made of sums of head rows either: they cancel after their terms were rounded,
    and over a head whose rows have a part in common entropy's was 11 % off, fkl's 9 %."""
    moving = {s.name for s in stats} - no_grad - NO_GRADIENT
    exact = short and not moving <= OWN_PROBABILITY
    # through the number's own type and without !r, which a compiler can turn to text where it is
    # symbolic
    tail = float(tail)
    flags = (
        ("exact", exact), ("frozen", frozen and not exact), (f"tail:{tail}", tail > 0.0),
        ("either", either and tail > 0.0 and not exact),
    )  # fmt: skip
    parts = (map(str, stats), sorted(no_grad), (name for name, on in flags if on), tensors)
    text = ";".join(",".join(part) for part in parts)
    return text if shard is None else f"{text};{write_shard(shard)}"


NO_PLAN = read_plan("logp;;;targets")  # of a record whose plan is still to be written
