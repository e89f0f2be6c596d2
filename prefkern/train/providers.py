"""Who supplies a tensor that a loss reads beside the policy's own statistics: one protocol for all.

A loss requires tensors by name. Some the objective fills in itself; every other one comes from a
provider of the run: the columns of the data, the counts of a step, or a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import losses
from ..integrations import hf
from ..losses.record import Loss
from ..objective.terms import filled_here
from ..stats import SeqStats
from .config import TrainConfig
from .data import Example, PreferenceBatch
from .processes import Processes
from .reference import Reference, ReferenceRows


class Micro(NamedTuple):
    """One micro-batch of one process."""

    examples: list[Example]
    batch: PreferenceBatch  # of these, on the device
    real: bool = True  # False: it only keeps this process in step with the others and counts 0


@dataclass(frozen=True)
class Opened:
    """What a provider is handed once data and models are there."""

    policy: hf.Model
    reference: Reference
    examples: list[Example]  # of training
    packed: bool
    pad_id: int
    device: torch.device
    processes: Processes
    training: bool  # False: the model is only evaluated
    resume: Path | None  # the checkpoint that the run continues from
    say: Callable[[str], None]
    frozen: Callable[[str], hf.Model]  # loads a further model, checked beside the policy


class Provider:
    """One source of tensors that losses read; what a provider does not need stays as it is here.

    It is made from options and losses alone (`wanted`, `supplies`, `check`), is handed policy, data
    and models as they come (`on_policy`, `on_examples`, `open`), and is then called around every
    step, in training and evaluation alike (`begin_step`, `arguments`, `learned`, `from_states`,
    `from_statistics`, `metrics`; `renew` and `after_step` in training).
    """

    offers: ClassVar[Mapping[str, str]] = {}  # tensor -> the option by which it would supply it
    wants_reference: ClassVar[str] = ""  # what it reads of the reference that only a model gives
    wants_layers: ClassVar[bool] = False  # the reference's hidden states after every block
    moves_reference: ClassVar[bool] = False  # the reference must have weights of its own
    counts_rounds: ClassVar[bool] = False  # what it gives depends on the number of processes
    makes_parts: ClassVar[bool] = True  # what it supplies counts as a part of a loss (Loss.parts)
    step_class: ClassVar[type[nn.Module] | None] = None  # takes the place of PreferenceStep

    def __init__(self, config: TrainConfig, records: Sequence[Loss]) -> None:
        self.config, self.records = config, records

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        """Whether a run with these options and losses has this provider."""
        raise NotImplementedError

    # Before anything is loaded.

    def supplies(self, record: Loss) -> frozenset[str]:
        """The arguments of `record` that it gives."""
        return frozenset()

    def reads(self, record: Loss) -> tuple[str, ...]:
        """Columns that it reads for `record` where rows have them."""
        return ()

    @property
    def takes(self) -> frozenset[str]:
        """Those of config.loss_args that are its own and are not handed to the losses."""
        return frozenset()

    @property
    def keeps_list_order(self) -> bool:
        """Whether the first answer of a list is another than the rest, so that none may move."""
        return False

    def check(self) -> None:
        """Raises ValueError for options and losses that it cannot serve, with what to do."""

    # While a run is prepared, in this order.

    def on_policy(self, policy: hf.Model, resume: Path | None, processes: int) -> None:
        """The policy as it was loaded, whole and not yet where it computes; `modules` are there
        after it, and are sharded with the policy before `open`."""

    def on_examples(self, examples: list[Example]) -> list[Example]:
        """Each data set as it was loaded."""
        return examples

    def open(self, opened: Opened) -> None:
        """Everything is there."""

    def modules(self) -> dict[str, nn.Module]:
        """What it trains beside the policy, by the prefix of the parameters' names."""
        return {}

    def parameter_group(self, name: str) -> tuple[str, dict[str, Any]] | None:
        """Optimizer group, and its options, of the parameter of that name; None: not its own."""
        return None

    # In every step.

    def begin_step(self, examples: list[Example], progress: float | None) -> None:
        """`examples` are those of all micro-batches and processes of the step, `progress` is the
        share of the run that is done; None in evaluation."""

    def watch(self, model: hf.Model) -> AbstractContextManager[None]:
        """Open during the reference's forward through `model`."""
        return nullcontext()

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        """Loss arguments of a micro-batch, constants; called without gradient."""
        return {}

    def learned(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Loss arguments with gradient; called inside the wrapped forward."""
        return {}

    def from_states(
        self,
        micro: Micro,
        hidden: Tensor,  # [B, T, D]
    ) -> dict[str, Any]:
        """Loss arguments read off the policy's last hidden states; called at its head, inside the
        wrapped forward, with gradient."""
        return {}

    def from_statistics(
        self,
        record: Loss,
        rows: list[SeqStats],  # detached, one per row of a group
        hyper: Mapping[str, Any],
        micro: Micro,
        training: bool,
    ) -> dict[str, Any]:
        """Arguments of `record` that follow from the statistics of its rows."""
        return {}

    def metrics(self) -> dict[str, Tensor]:
        """What to log of the last micro-batch, as means."""
        return {}

    def renew(self, step: int) -> bool:
        """Before the step that follows number `step`, in training: whether it changed the examples
        of the run, whose next epoch then begins."""
        return False

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After the optimizer's step number `step` (from 1)."""

    # Checkpoints.

    def moved(self) -> dict[str, nn.Module]:
        """Frozen models that are no longer as they were loaded, by a name; a sharded checkpoint
        holds them in parts, any other in what `save` writes."""
        return {}

    def state(self) -> dict[str, Any]:
        """Its part of the checkpoint's JSON."""
        return {}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes `state` back out of that JSON."""

    def save(self, folder: Path) -> None:
        """Files of its own in a checkpoint."""

    def load(self, folder: Path) -> None:
        """Reads them."""

    def save_final(self, folder: Path) -> None:
        """Files beside the trained model."""


def supplied(record: Loss, config: TrainConfig, providers: Iterable[Provider]) -> frozenset[str]:
    """The arguments of `record` that a run gives it."""
    found = {*filled_here(record), *config.loss_args}
    return frozenset(found).union(*(provider.supplies(record) for provider in providers))


def lacking_parts(
    records: Sequence[Loss], config: TrainConfig, providers: Iterable[Provider]
) -> list[str]:
    """What to say of losses that are trained without a part that makes them the method; a column of
    constants is no such part.

    Raises:
        ValueError: a part without which a run would be another method under the name.
    """
    notes = []
    for record in records:
        given = {n for p in providers if p.makes_parts for n in p.supplies(record)}
        for part in record.parts:
            if part.name in given or part.name in config.loss_args:
                continue
            text = f"loss {record.name!r} is its method only with {part.how}; here {part.without}."
            if part.refused:
                raise ValueError(text)
            notes.append(text)
    return notes


def check_supplied(
    config: TrainConfig, records: Sequence[Loss], providers: Sequence[Provider]
) -> None:
    """Refuses a loss that requires a tensor which nothing in the run supplies."""
    for record in records:
        given = supplied(record, config, providers)
        missing = [name for name in losses.required(record) if name not in given]
        if missing:
            raise ValueError(
                f"loss {record.name!r} needs {' and '.join(missing)}, which this trainer does not "
                "supply; call prefkern.preference_loss from a loop of your own."
            )
