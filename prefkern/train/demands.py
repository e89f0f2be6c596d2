"""What the losses of a run ask of it, read off their records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import losses
from ..losses.record import Loss
from ..stats import TWO_MODEL_STATS
from .config import TrainConfig
from .data import Example, Loaded
from .read_config import nearest

# Losses over pairs or lists read no other rows; those over sequences or tokens read any.
_LAYOUTS = {"pairwise": "pairs", "listwise": "lists"}


def losses_of(config: TrainConfig) -> list[Loss]:
    """The records of config.loss.

    Raises:
        ValueError: an unknown loss, or one that reads no language model.
    """
    records = [losses.resolve(name)[0] for name in config.loss]
    for record in records:
        if record.family == "diffusion":
            raise ValueError(
                f"loss {record.name!r} compares prediction errors of a diffusion model, which has "
                f"no language-model head to train here; call prefkern.losses.{record.name} on "
                "prefkern.error_sum from a loop of your own."
            )
    return records


def check_loss_args(config: TrainConfig, records: Sequence[Loss], taken: Iterable[str]) -> None:
    """Refuses hyper-parameters that no loss has and that are not among `taken`, and values that are
    none of the kind that the loss declares."""
    known = {*taken, *(name for record in records for name in losses.arguments(record))}
    for name in config.loss_args:
        if name not in known:
            near = nearest(name, known) or f"; known: {', '.join(sorted(known)) or 'none'}"
            raise ValueError(f"loss {', '.join(config.loss)} has no argument {name!r}{near}.")
        for record in records:
            parameter = losses.arguments(record).get(name)
            if parameter is not None and not _fits(config.loss_args[name], parameter.annotation):
                kinds = [k.strip() for k in str(parameter.annotation).split("|")]
                words = " or ".join(dict.fromkeys(_WORDS.get(kind, kind) for kind in kinds))
                raise ValueError(
                    f"loss_args: {name} of loss {record.name} must be {words}, got "
                    f"{config.loss_args[name]!r}; write --loss-arg {name}=VALUE."
                )


_WORDS = {
    "float": "a number", "Tensor": "a number", "int": "an integer", "bool": "true or false",
    "str": "a word", "None": "null",
}  # fmt: skip


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value from a command line or YAML is of a declared kind; True where the declaration
    names a kind that is not known here."""
    for kind in str(annotation).split("|"):
        match kind.strip():
            case "float" | "Tensor":
                found = isinstance(value, int | float) and not isinstance(value, bool)
            case "int":
                found = isinstance(value, int) and not isinstance(value, bool)
            case "bool":
                found = isinstance(value, bool)
            case "str":
                found = isinstance(value, str)
            case "None":
                found = value is None
            case _:
                found = True
        if found:
            return True
    return False


def calls_of(config: TrainConfig) -> list[losses.Bound]:
    """The losses with the hyper-parameters of the run."""
    calls = []
    for name in config.loss:
        record, fixed = losses.resolve(name)
        known = losses.arguments(record)
        given = fixed | {k: v for k, v in config.loss_args.items() if k in known}
        calls.append(losses.bind(record, given, supplied=losses.required(record)))
    return calls


def stats_of(calls: Iterable[losses.Bound]) -> frozenset[str]:
    """Names of the token statistics that losses read, without parameters."""
    return frozenset(stat.partition(":")[0] for call in calls for stat in call.stats)


def label_range(config: TrainConfig) -> tuple[float, float] | None:
    """Lowest and highest label that all losses of the run are made for; None: any."""
    calls = zip(losses_of(config), calls_of(config), strict=True)
    ranges = [found for record, call in calls if (found := record.label_range(**call.hyper))]
    if not ranges:
        return None
    return max(low for low, _ in ranges), min(high for _, high in ranges)


@dataclass(frozen=True)
class ReferenceNeeds:
    """What the losses of a run read of the reference."""

    logp: bool  # its log-probabilities
    distribution: bool  # its whole distribution (a KL and the like)
    tokens: bool  # a number per token, not only per sequence
    teacher: bool  # it is a teacher: another model than the policy's start

    @classmethod
    def of(cls, config: TrainConfig) -> ReferenceNeeds:
        records, calls = losses_of(config), calls_of(config)
        compared = frozenset(TWO_MODEL_STATS) - {"ref_logp"}
        return cls(
            logp=any(call.needs_reference for call in calls),
            distribution=bool(stats_of(calls) & compared),
            tokens=any(r.weights or r.family == "tokenwise" for r in records),
            teacher=any(
                not call.needs_reference and bool(stats_of([call]) & compared) for call in calls
            ),
        )

    @property
    def any(self) -> bool:
        return self.logp or self.distribution


def wanted_layout(record: Loss) -> str | None:
    """The layout of rows a loss trains on; None: any."""
    return "unpaired" if "desirable" in record.extra else _LAYOUTS.get(record.family)


def check_layout(records: Iterable[Loss], layout: str) -> None:
    """Refuses losses that train on other rows than the data hold."""
    for record in records:
        wanted = wanted_layout(record)
        if wanted not in (None, layout) and not (record.alone and layout == "unpaired"):
            raise ValueError(
                f"loss {record.name!r} is {record.family} and trains on {wanted}, but the data are "
                f"{layout}; choose another loss (prefkern losses) or other data."
            )


def check_stored(data: Mapping[str, Loaded | None]) -> None:
    """Refuses rows without the numbers that reference=columns reads of every one; `data` by the
    names of their options."""
    for option, loaded in data.items():
        examples = [] if loaded is None else loaded.examples
        bare = [str(example.row) for example in examples if example.ref_seq_logp is None]
        if bare:
            shown = ", ".join(bare[:8]) + (" ..." if len(bare) > 8 else "")
            raise ValueError(
                "reference=columns needs ref_chosen_logps and ref_rejected_logps in every row, but "
                f"{len(bare)} rows of {option} lack them ({shown}); use reference=model."
            )


def likelihood_row(records: Sequence[Loss]) -> int:
    """Place in a group of the answer that likelihood terms score.

    Raises:
        ValueError: terms that score different answers, which have one denominator here.
    """
    rows = {r.rows.index(r.supervised.rows) for r in records if r.supervised is not None}
    if len(rows) > 1:
        raise ValueError(
            f"losses {[r.name for r in records]} add likelihood terms of different answers; train "
            "them apart."
        )
    return next(iter(rows), 0)


def whole_row(records: Sequence[Loss], config: TrainConfig) -> int | None:
    """The answer of each group whose prompt likelihood terms score too; None: of none.

    Raises:
        ValueError: likelihood_prompt without a likelihood term.
    """
    row = likelihood_row(records)
    if not config.likelihood_prompt:
        return None
    if all(record.supervised is None and not record.whole for record in records):
        raise ValueError(
            f"likelihood_prompt: loss {', '.join(config.loss)} has no likelihood term; drop it."
        )
    return row


def count_items(examples: list[Example], row: int = 0, *, whole: bool = False) -> dict[str, int]:
    """Denominators of one step, over all its micro-batches and processes.

    `row` is the answer of each group that likelihood terms score, with its prompt where `whole`.
    """
    answers = [e.sequences[row] for e in examples]
    return {
        "pairs": len(examples),
        "groups": len(examples),
        "sequences": sum(len(e.sequences) for e in examples),
        # of the answers that likelihood terms score
        "tokens": sum(len(s.input_ids) - 1 if whole else s.length for s in answers),
        # of the losses that are means over tokens
        "scored_tokens": sum(s.length for e in examples for s in e.sequences),
    }


def check_compared(config: TrainConfig, mode: str) -> None:
    """Refuses an evaluation in which the model would be its own reference."""
    if mode == "model" and config.ref_model is None:
        raise ValueError(
            "evaluation compares the model with a reference: pass --ref-model, the model it was "
            "trained from (a model compared with itself has margins of 0)."
        )
