"""Losses with a memory: states that a run owns, updates once per micro-batch, and checkpoints.

A loss declares a pure `update(state, rows) -> state`. Here stands what each of them starts from,
which arguments of the loss its state gives, and how ranks agree: the rows of all ranks are gathered
and every rank makes the same update, so a state does not depend on how a batch was dealt out. It
does depend on the size of the micro-batches, as in the authors' code. Evaluation reads a state and
leaves it as it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import losses
from ..losses.pairwise import beta_dpo, selfie
from ..losses.pointwise import bco
from ..losses.record import Loss
from ..stats import SeqStats
from .checkpoint import STATE_FILE, read_json
from .data.extra import UNKNOWN

FILE = "loss_states.json"  # beside a trained model


@dataclass(frozen=True)
class Batch:
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
    forward: Callable[[Any, Batch], tuple[Any, dict[str, Any]]]  # -> (state, arguments)
    restore: Callable[[Any], Any]  # JSON -> state
    supplies: tuple[str, ...]  # arguments of the loss
    options: Mapping[str, Any] = {}  # further loss arguments that only the rule reads
    columns: tuple[str, ...] = ()  # extra columns that only the rule reads


def _bco(state: bco.BcoState, batch: Batch) -> tuple[Any, dict[str, Any]]:
    if batch.training:
        state = batch.update(state, *batch.rows)
    return state, {"delta": state.mean}


def _beta_dpo(state: beta_dpo.BetaState, batch: Batch) -> tuple[Any, dict[str, Any]]:
    keep = torch.ones_like(batch.own[0].require("logp"))
    if not batch.training:
        return state, {"keep": keep, "gap_mean": state.mean}
    before, state = state, batch.update(state, *batch.rows)
    chosen, rejected = batch.rows
    picked = beta_dpo.select(
        chosen, rejected, state, rho=batch.options["rho"], generator=batch.generator
    )
    # The objective divides by all pairs and the loss is a mean over the kept ones of all ranks.
    share = picked.numel() / max(1.0, float(picked.sum()))
    gap = chosen.logratio - rejected.logratio
    average = batch.options["gap_mean"] if "gap_mean" in batch.given else before.mean
    knobs = {name: batch.options[name] for name in ("beta", "a", "ema")}
    beta = beta_dpo.batch_beta(gap, picked.to(gap.dtype), average, **knobs)
    # One beta for the pairs of all ranks; with a = 0 the loss takes it as it is.
    own = keep if batch.mine is None else picked[batch.mine].to(keep) * share
    return state, {"keep": own, "gap_mean": before.mean, "beta": beta, "a": 0.0}


def _lcpo(state: dict[str, float], batch: Batch) -> tuple[Any, dict[str, Any]]:
    first = float(batch.options["eta"])
    now = [state.get(name, first) for name in batch.own_names]
    eta = batch.own[0].require("logp").new_tensor(now)
    if not batch.training:
        return state, {"eta": eta}
    after = dict(state)
    for name in sorted(set(batch.names)):
        rows = torch.tensor([i for i, other in enumerate(batch.names) if other == name])
        pair = [row.index(rows.to(row.require("logp").device)) for row in batch.rows]
        after[name] = batch.update(state.get(name, first), *pair)
    return after, {"eta": eta}


def _selfie(state: selfie.SelfieState, batch: Batch) -> tuple[Any, dict[str, Any]]:
    # The mixed model is the policy itself: mixture 1, the authors' released setting.
    chosen, rejected = batch.own
    arguments = {
        "mix_chosen_logps": chosen.require("logp"),
        "mix_rejected_logps": rejected.require("logp"),
        # In the first part of a run no label is doubted.
        "threshold": -math.inf
        if batch.progress < batch.options["warmup"]
        else selfie.threshold(state),
    }
    if batch.training:
        every = dict(zip(("mix_chosen_logps", "mix_rejected_logps"),
                         (row.require("logp") for row in batch.rows), strict=True))  # fmt: skip
        state = batch.update(state, *batch.rows, **every)
    return state, arguments


RULES: dict[str, Rule] = {
    "bco": Rule(lambda _: bco.BcoState(), _bco, lambda s: bco.BcoState(*s), ("delta",)),
    "beta_dpo": Rule(
        lambda _: beta_dpo.BetaState(), _beta_dpo, lambda s: beta_dpo.BetaState(*s),
        ("keep", "gap_mean"), {"rho": 0.2},
    ),
    "lcpo": Rule(lambda _: {}, _lcpo, dict, ("eta",), {"ema": 0.1}, ("annotator",)),
    "selfie": Rule(
        lambda _: selfie.SelfieState(), _selfie, lambda s: selfie.SelfieState(tuple(s[0])),
        ("mix_chosen_logps", "mix_rejected_logps", "threshold"), {"warmup": 0.2},
    ),
}  # fmt: skip


# Arguments that say nothing as a mean.
UNLOGGED = frozenset({"keep", "a", "mix_chosen_logps", "mix_rejected_logps"})


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


class LossStates:
    """The states of a run's losses; the checkpoint holds `as_dict()`.

    Args:
        records: The losses of the run.
        given: Loss arguments and columns that the user gave: a state does not replace them.
        loss_args: Loss arguments, for the rules' own options.
        seed: Of what a rule draws.
    """

    def __init__(
        self, records: Sequence[Loss], given: frozenset[str], loss_args: dict[str, Any], seed: int
    ) -> None:
        self.given, self.loss_args, self.seed = given, loss_args, seed
        self.rules = {r.name: rule for r in records if (rule := rule_of(r)) is not None}
        self.values = {name: rule.start(loss_args) for name, rule in self.rules.items()}
        # arguments that no loss takes: the step leaves them out
        self.options = {name for rule in self.rules.values() for name in rule.options}
        self.options -= {name for record in records for name in losses.arguments(record)}
        self.updates = 0
        self.progress = 1.0  # share of the run that is done; a training loop sets it
        self._found: dict[str, dict[str, Tensor]] = {}  # by loss

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What the states gave the last micro-batch, as means."""
        return {name: value for found in self._found.values() for name, value in found.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON (which keeps every bit of a Python float)."""
        return {"updates": self.updates, "values": dict(self.values)}

    def load_from(self, folder: Path) -> None:
        """What a training run of the same losses left with its model or in a checkpoint; evaluation
        of that model then reads the state it was trained with."""
        file, checkpoint = folder / FILE, folder / STATE_FILE
        if file.is_file():
            saved = read_json(file)
        elif checkpoint.is_file():
            saved = read_json(checkpoint)["losses"]
        else:
            return
        self.load(saved)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes over the states of the losses that are in both runs."""
        self.updates = saved["updates"]
        self.values |= {
            n: self.rules[n].restore(v) for n, v in saved["values"].items() if n in self.rules
        }

    def arguments(
        self,
        record: Loss,
        own: list[SeqStats],
        hyper: Mapping[str, Any],
        *,
        names: list[str] | None,
        training: bool,
        real: bool,
    ) -> dict[str, Any]:
        """Arguments of `record` from its state, which moves on when `training`.

        Args:
            record: A loss with a state.
            own: Detached statistics of this rank's rows, one record per row of a group.
            hyper: The loss's hyper-parameters.
            names: Annotator of each group, where the data have them.
            training: Whether the state moves on.
            real: False for a batch that only keeps a rank in step.
        """
        rule = self.rules[record.name]
        if self.given.issuperset(rule.supplies):
            return {}
        options = {**rule.options, **hyper, **self.loss_args}
        count = own[0].require("logp").numel()
        own_names = [UNKNOWN] * count if names is None else names
        rows, every = own, own_names
        mine: slice | None = slice(0, count)
        if training:
            rows, every, mine = gather(own, own_names, real)
        generator = torch.Generator(own[0].require("logp").device)
        generator.manual_seed(self.seed * 1_000_003 + self.updates)
        keywords = inspect.signature(record.update).parameters if record.update else {}
        fixed = {k: v for k, v in options.items() if k in keywords and k not in rule.supplies}

        def update(*positional: Any, **more: Any) -> Any:
            assert record.update is not None
            return record.update(*positional, **fixed, **more)

        batch = Batch(
            update, rows, own, mine, every, own_names, options, self.progress, generator,
            self.given, training,
        )  # fmt: skip
        state, found = rule.forward(self.values[record.name], batch)
        if training:
            self.values[record.name] = state
            self.updates += 1
        kept = self.given.intersection(rule.supplies)
        found = {k: v for k, v in found.items() if k not in kept}
        like, logged = own[0].require("logp"), {}
        for name, value in found.items():
            if name in UNLOGGED:
                continue
            if isinstance(value, Tensor):
                logged[f"state/{name}"] = value.double().mean()
            elif isinstance(value, float) and math.isfinite(value):
                logged[f"state/{name}"] = like.new_tensor(value, dtype=torch.float64)
        self._found[record.name] = logged
        return found


def gather(
    own: list[SeqStats], names: list[str], real: bool
) -> tuple[list[SeqStats], list[str], slice | None]:
    """Rows and names of all ranks in rank order, and where this rank's stand (None: nowhere)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own, names, slice(0, len(names))
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    plain = [[None if f is None else f.cpu() for f in row] for row in own] if real else []
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, (plain, names if real else []))
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
