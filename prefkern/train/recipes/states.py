"""Losses with a memory: states that a run owns, updates once per micro-batch, and checkpoints.

A loss declares a pure `update(state, rows) -> state`. Here stands what each of them starts from,
which arguments of the loss its state gives, and how ranks agree: the rows of all ranks are gathered
and every rank makes the same update, so a state does not depend on how a batch was dealt out. It
does depend on the size of the micro-batches, as in the authors' code. Evaluation reads a state and
leaves it as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import losses
from ...losses.pairwise import beta_dpo, selfie
from ...losses.pointwise import bco
from ...losses.record import Loss
from ...prep.annotators import UNKNOWN
from ...stats import SeqStats
from ..config import TrainConfig
from ..processes import Processes
from ..providers import Micro, Opened, Provider
from ..seals import STATE_FILE, read_json, write_json

FILE = "loss_states.json"  # beside a trained model


@dataclass(frozen=True)
class Seen:
    """What a rule sees of a micro-batch."""

    update: Callable[..., Any]  # of the loss, its hyper-parameters filled in
    rows: list[SeqStats]  # of all ranks, one record per row of a group
    own: list[SeqStats]  # of this rank
    mine: slice | None  # where this rank's rows stand in `rows`; None: a filler, not among them
    names: list[str]  # annotators of all ranks' rows
    own_names: list[str]
    options: dict[str, Any]  # hyper-parameters and the rule's own options
    progress: float  # share of the run that is done
    generator: torch.Generator  # the same on all ranks
    given: frozenset[str]  # arguments that the user gave
    training: bool


class Rule(NamedTuple):
    """How the state of one loss is kept."""

    start: Callable[[dict[str, Any]], Any]  # options -> state
    forward: Callable[[Any, Seen], tuple[Any, dict[str, Any]]]  # -> (state, arguments)
    restore: Callable[[Any], Any]  # JSON -> state
    supplies: tuple[str, ...]  # arguments of the loss
    options: Mapping[str, Any] = {}  # further loss arguments that only the rule reads
    columns: tuple[str, ...] = ()  # extra columns that only the rule reads


def _bco(state: bco.BcoState, seen: Seen) -> tuple[Any, dict[str, Any]]:
    if seen.training:
        state = seen.update(state, *seen.rows)
    return state, {"delta": state.mean}


def _beta_dpo(state: beta_dpo.BetaState, seen: Seen) -> tuple[Any, dict[str, Any]]:
    keep = torch.ones_like(seen.own[0].require("logp"))
    if not seen.training:
        return state, {"keep": keep, "gap_mean": state.mean}
    before, state = state, seen.update(state, *seen.rows)
    chosen, rejected = seen.rows
    picked = beta_dpo.select(
        chosen, rejected, state, rho=seen.options["rho"], generator=seen.generator
    )
    # The objective divides by all pairs and the loss is a mean over the kept ones of all ranks.
    share = picked.numel() / max(1.0, float(picked.sum()))
    gap = chosen.logratio - rejected.logratio
    average = seen.options["gap_mean"] if "gap_mean" in seen.given else before.mean
    knobs = {name: seen.options[name] for name in ("beta", "a", "ema")}
    beta = beta_dpo.batch_beta(gap, picked.to(gap.dtype), average, **knobs)
    # One beta for the pairs of all ranks; with a = 0 the loss takes it as it is.
    own = keep if seen.mine is None else picked[seen.mine].to(keep) * share
    return state, {"keep": own, "gap_mean": before.mean, "beta": beta, "a": 0.0}


def _lcpo(state: dict[str, float], seen: Seen) -> tuple[Any, dict[str, Any]]:
    first = float(seen.options["eta"])
    now = [state.get(name, first) for name in seen.own_names]
    eta = seen.own[0].require("logp").new_tensor(now)
    if not seen.training:
        return state, {"eta": eta}
    after = dict(state)
    for name in sorted(set(seen.names)):
        rows = torch.tensor([i for i, other in enumerate(seen.names) if other == name])
        pair = [row.index(rows.to(row.require("logp").device)) for row in seen.rows]
        after[name] = seen.update(state.get(name, first), *pair)
    return after, {"eta": eta}


def _selfie(state: selfie.SelfieState, seen: Seen) -> tuple[Any, dict[str, Any]]:
    # In the first part of a run no label is doubted.
    early = seen.progress < seen.options["warmup"]
    threshold = selfie.NO_DOUBT if early else selfie.threshold(state)
    if seen.training:
        state = seen.update(state, *seen.rows)
    return state, {"threshold": threshold}


LCPO = Rule(lambda _: {}, _lcpo, dict, ("eta",), {"ema": 0.1}, ("annotator",))
RULES: dict[str, Rule] = {
    "bco": Rule(lambda _: bco.BcoState(), _bco, lambda s: bco.BcoState(*s), ("delta",)),
    "beta_dpo": Rule(
        lambda _: beta_dpo.BetaState(), _beta_dpo, lambda s: beta_dpo.BetaState(*s),
        ("keep", "gap_mean"), {"rho": 0.2},
    ),
    "lcpo": LCPO, "lcpo_simpo": LCPO, "lcpo_cpo": LCPO,
    "selfie": Rule(
        lambda _: selfie.SelfieState(), _selfie, lambda s: selfie.SelfieState(tuple(s[0])),
        ("threshold",), {"warmup": 0.2},
    ),
}  # fmt: skip


# Arguments that say nothing as a mean.
UNLOGGED = frozenset({"keep", "a"})


def rule_of(record: Loss) -> Rule | None:
    """The rule of a loss with a state; raises where a loss has one and no rule is known."""
    if record.update is None:
        return None
    if record.name not in RULES:
        raise ValueError(
            f"loss {record.name!r} keeps a state between steps that this trainer does not know; "
            "call prefkern.preference_loss from a loop of your own."
        )
    return RULES[record.name]


class LossStates(Provider):
    """The states of a run's losses, and the arguments that they give."""

    counts_rounds = True

    def __init__(self, config: TrainConfig, records: Sequence[Loss]) -> None:
        super().__init__(config, records)
        # what the user gave, as a number or a column, a state does not replace
        self.given = frozenset(config.loss_args) | frozenset(config.columns)
        self.rules = {r.name: rule for r in records if (rule := rule_of(r)) is not None}
        self.values = {name: rule.start(config.loss_args) for name, rule in self.rules.items()}
        self.processes = Processes(None)
        self.updates = 0
        self.progress = 1.0  # share of the run that is done
        self._found: dict[str, dict[str, Tensor]] = {}  # by loss

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return any(rule_of(record) is not None for record in records)

    def supplies(self, record: Loss) -> frozenset[str]:
        rule = self.rules.get(record.name)
        return frozenset() if rule is None else frozenset(rule.supplies) - self.given

    def reads(self, record: Loss) -> tuple[str, ...]:
        rule = self.rules.get(record.name)
        return () if rule is None else rule.columns

    @property
    def takes(self) -> frozenset[str]:
        """Arguments of the rules that no loss takes."""
        options = {name for rule in self.rules.values() for name in rule.options}
        return frozenset(options.difference(*map(losses.arguments, self.records)))

    def open(self, opened: Opened) -> None:
        self.processes = opened.processes
        if not opened.training:
            self.load_from(Path(self.config.model))

    def load_from(self, folder: Path) -> None:
        """What a training run of the same losses left with its model or in a checkpoint; evaluation
        of that model then reads the state it was trained with."""
        file, checkpoint = folder / FILE, folder / STATE_FILE
        if file.is_file():
            self.restore({"losses": read_json(file)})
        elif checkpoint.is_file():
            self.restore(read_json(checkpoint))

    def state(self) -> dict[str, Any]:
        """Plain values, ready for JSON (which keeps every bit of a Python float)."""
        return {"losses": {"updates": self.updates, "values": dict(self.values)}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over the states of the losses that are in both runs."""
        if (found := saved.get("losses")) is None:
            return
        self.updates = found["updates"]
        self.values |= {
            n: self.rules[n].restore(v) for n, v in found["values"].items() if n in self.rules
        }

    def save_final(self, folder: Path) -> None:
        write_json(folder / FILE, self.state()["losses"])

    def begin_step(self, examples: list[Any], progress: float | None) -> None:
        if progress is not None:
            self.progress = progress

    def from_statistics(
        self,
        record: Loss,
        rows: list[SeqStats],
        hyper: Mapping[str, Any],
        micro: Micro,
        training: bool,
    ) -> dict[str, Any]:
        """Arguments of `record` from its state, which moves on when `training`."""
        rule = self.rules.get(record.name)
        if rule is None or self.given.issuperset(rule.supplies):
            return {}
        seen = self._seen(record, rule, rows, hyper, micro, training)
        state, found = rule.forward(self.values[record.name], seen)
        if training:
            self.values[record.name] = state
            self.updates += 1
        kept = self.given.intersection(rule.supplies)
        found = {k: v for k, v in found.items() if k not in kept}
        self._found[record.name] = _means(found, rows[0].require("logp"))
        return found

    def _seen(
        self,
        record: Loss,
        rule: Rule,
        own: list[SeqStats],
        hyper: Mapping[str, Any],
        micro: Micro,
        training: bool,
    ) -> Seen:
        logp = own[0].require("logp")
        options = {**rule.options, **hyper, **self.config.loss_args}
        own_names = micro.batch.columns.get("annotator") or [UNKNOWN] * logp.numel()
        rows, every = own, own_names
        mine: slice | None = slice(0, logp.numel())
        if training:
            rows, every, mine = gather(self.processes, own, own_names, micro.real)
        generator = torch.Generator(logp.device)
        generator.manual_seed(self.config.seed * 1_000_003 + self.updates)
        keywords = inspect.signature(record.update).parameters if record.update else {}
        fixed = {k: v for k, v in options.items() if k in keywords and k not in rule.supplies}

        def update(*positional: Any, **more: Any) -> Any:
            assert record.update is not None
            return record.update(*positional, **fixed, **more)

        return Seen(
            update, rows, own, mine, every, own_names, options, self.progress, generator,
            self.given, training,
        )  # fmt: skip

    def metrics(self) -> dict[str, Tensor]:
        """What the states gave the last micro-batch, as means."""
        return {name: value for found in self._found.values() for name, value in found.items()}


def _means(found: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    logged = {}
    for name, value in found.items():
        if name in UNLOGGED:
            continue
        if isinstance(value, Tensor):
            logged[f"state/{name}"] = value.double().mean()
        elif isinstance(value, float) and abs(value) < -selfie.NO_DOUBT:
            logged[f"state/{name}"] = like.new_tensor(value, dtype=torch.float64)
    return logged


def gather(
    processes: Processes, own: list[SeqStats], names: list[str], real: bool
) -> tuple[list[SeqStats], list[str], slice | None]:
    """Rows and names of all ranks in rank order, and where this rank's stand (None: nowhere)."""
    world, rank = processes.world, processes.rank
    if world == 1:
        return own, names, slice(0, len(names))
    plain = [[None if f is None else f.cpu() for f in row] for row in own] if real else []
    everyone = processes.gather((plain, names if real else []))
    parts = [rows for rows, _ in everyone if rows]
    device = own[0].require("logp").device

    def joined(role: int) -> SeqStats:
        columns = zip(*(rows[role] for rows in parts), strict=True)
        return SeqStats(*(None if c[0] is None else torch.cat(c).to(device) for c in columns))

    sizes = [len(part) for _, part in everyone]
    start = sum(sizes[:rank])
    every = [name for _, part in everyone for name in part]
    mine = slice(start, start + sizes[rank]) if real else None
    return [joined(role) for role in range(len(own))], every, mine
