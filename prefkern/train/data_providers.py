"""What every run supplies: the columns of its data, and the counts of each step."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import losses
from ..losses.record import Loss
from .config import TrainConfig
from .data import Example
from .data.columns import KINDS, NAME, TEXT, Column, kind_for
from .data.unread import TEXTS
from .providers import Micro, Provider, supplied
from .read_config import nearest
from .reference import ReferenceRows


class Columns(Provider):
    """The extra columns of the data, and the labels of single answers.

    A required tensor that no other provider supplies is read from the column of its name; an
    optional one only where config.columns names it.

    Args:
        config, records: As for every provider.
        others: The other providers of the run.
        offers: Tensor -> what would supply it without a column.

    Raises:
        ValueError: a column for an argument that no loss has or that no column can give; losses
            that read a different number of answers per row.
    """

    makes_parts = False  # numbers of a file: nothing learns or samples them

    def __init__(
        self,
        config: TrainConfig,
        records: Sequence[Loss],
        others: Sequence[Provider] = (),
        offers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(config, records)
        self.roles = roles_of(records, config)
        self.columns: dict[str, Column] = {}
        known = set(self.roles)
        for record in records:
            required = losses.required(record)
            own = [name for provider in others for name in provider.reads(record)]
            readable = [*own, *(n for n in tensor_arguments(record) if n in KINDS)]
            known |= set(readable)
            needed = set(required) - supplied(record, config, others)
            for name in (*required, *readable):
                wanted = name in needed or name in own or name in config.columns
                if not wanted or name not in KINDS:
                    continue
                self.columns.setdefault(
                    name,
                    Column(
                        name, kind_for(name, required), config.columns.get(name, name),
                        record.name, (offers or {}).get(name, ""),
                    ),
                )  # fmt: skip
        for name in config.columns:
            if name in config.loss_args:
                raise ValueError(
                    f"columns and loss_args both give {name!r}, the column "
                    f"{config.columns[name]!r} and {config.loss_args[name]!r}; drop one."
                )
            if name not in known and name not in TEXTS:
                near = (
                    nearest(name, known | {*TEXTS})
                    or f"; known: {', '.join(sorted(known)) or 'none'}"
                )
                raise ValueError(
                    f"columns: loss {', '.join(config.loss)} reads no column for {name!r}{near}."
                )

    @property
    def labelled(self) -> bool:
        """Whether single answers must have a label."""
        return any("desirable" in losses.required(record) for record in self.records)

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({"desirable", *self.columns})

    def on_examples(self, examples: list[Example]) -> list[Example]:
        alone = any(record.alone for record in self.records)
        if alone and (bad := sum(example.desirable is False for example in examples)):
            raise ValueError(
                f"loss {', '.join(self.config.loss)} imitates every single answer, and {bad} of "
                f"{len(examples)} have the label false; leave those rows or the column label out."
            )
        return examples

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        batch = micro.batch
        given = {**batch.columns, **{k: v.flatten() for k, v in batch.numbers.items()}}
        return {name: given[name] for name, column in self.columns.items() if column.kind != NAME}


def roles_of(records: Sequence[Loss], config: TrainConfig) -> dict[str, Column]:
    """Answers of a pair beside chosen and rejected, by role, and the columns they stand in.

    Raises:
        ValueError: losses that read a different number of answers per row.
    """
    rows = {r.rows: r.name for r in records if r.family == "pairwise"}
    if len(rows) > 1:
        raise ValueError(
            f"losses {[r.name for r in records]} read different answers of a row: "
            f"{' and '.join(', '.join(names) for names in sorted(rows))}; train them apart."
        )
    return {
        role: Column(role, TEXT, config.columns.get(role, role), loss)
        for names, loss in rows.items()
        for role in names[2:]
    }


def tensor_arguments(record: Loss) -> list[str]:
    """Arguments of a loss that may be tensors: of the others no row has a value of its own."""

    def is_tensor(annotation: Any) -> bool:
        parts = (
            annotation.split("|")
            if isinstance(annotation, str)
            else typing.get_args(annotation) or (annotation,)
        )
        return any(part is Tensor or str(part).strip() == "Tensor" for part in parts)

    found = losses.arguments(record).items()
    return [name for name, parameter in found if is_tensor(parameter.annotation)]


class StepCounts(Provider):
    """Means over the tokens or pairs of a whole step, for losses that take them: with them a step
    is the same for any split into micro-batches and processes."""

    def __init__(self, config: TrainConfig, records: Sequence[Loss]) -> None:
        super().__init__(config, records)
        taken = {name for record in records for name in losses.arguments(record)}
        self.wanted_here = sorted((taken & COUNTS.keys()) - config.loss_args.keys())
        self.given: dict[str, float] = {}

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return any(COUNTS.keys() & losses.arguments(record).keys() for record in records)

    @property
    def keeps_list_order(self) -> bool:
        # a loss whose tokens per group are those of one answer reads the first one by its place
        return any(
            record.family == "listwise" and "tokens_per_group" in losses.arguments(record)
            for record in self.records
        )

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset(self.wanted_here)

    def begin_step(self, examples: list[Example], progress: float | None) -> None:
        whole = self.config.likelihood_prompt and any(record.whole for record in self.records)
        counts = COUNTS | ({"tokens_per_group": _whole_length} if whole else {})
        self.given = {name: counts[name](examples) for name in self.wanted_here}

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        return dict(self.given)


def _mean_length(examples: list[Example], answer: int) -> float:
    """Scored tokens of one answer, a mean over the groups."""
    return sum(example.sequences[answer].length for example in examples) / len(examples)


def _whole_length(examples: list[Example]) -> float:
    """Tokens of the first answer and its prompt, all but the very first, a mean over the groups."""
    return sum(len(e.sequences[0].input_ids) - 1 for e in examples) / len(examples)


def _tokens_per_sequence(examples: list[Example]) -> float:
    lengths = [seq.length for example in examples for seq in example.sequences]
    return sum(lengths) / len(lengths)


def _pairs_per_sequence(examples: list[Example]) -> float:
    """Ordered pairs of answers of different preference levels."""
    levels = [example.columns["preference_levels"] for example in examples]
    pairs = sum(a < b for group in levels for b in group for a in group)
    return pairs / sum(map(len, levels))


# Argument of a loss -> its value over the examples of one whole step.
COUNTS = {
    "tokens_per_sequence": _tokens_per_sequence,
    "tokens_per_group": lambda examples: _mean_length(examples, 0),
    "chosen_tokens": lambda examples: _mean_length(examples, 0),
    "rejected_tokens": lambda examples: _mean_length(examples, 1),
    "pairs_per_sequence": _pairs_per_sequence,
}
