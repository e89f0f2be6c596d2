"""What the losses of a run read beside hidden states: extra columns, further answers, step counts.

Everything here is read off the loss records, so a new loss needs no change unless it names a tensor
that no other loss has (`KINDS` in data/extra.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .. import losses
from ..losses.record import Loss
from ..objective.terms import filled_here
from .config import TrainConfig, nearest
from .data import Example
from .data.extra import KINDS, KINDS_OF_LOSS, TEXT, Extra
from .loop_options import supplied
from .states import rule_of

# Tensors that the loop computes itself.
COMPUTED = frozenset(
    {"desirable", "kl_baseline", "reward_mask", "kl_mask", "activations", "hook_type", "aux_logp"}
)
# Denominators of a loss over one whole optimizer step, filled by `step_arguments`.
STEP_ARGUMENTS = frozenset(
    {"tokens_per_sequence", "tokens_per_group", "pairs_per_sequence", "chosen_tokens"}
    | {"rejected_tokens"}
)


def roles_of(records: Sequence[Loss], config: TrainConfig) -> dict[str, Extra]:
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
        role: Extra(role, TEXT, config.columns.get(role, role), loss)
        for names, loss in rows.items()
        for role in names[2:]
    }


def extras_of(records: Sequence[Loss], config: TrainConfig) -> list[Extra]:
    """The extra columns a run reads: every tensor that a loss requires and that neither the loop,
    a state nor an option supplies, and the optional ones that config.columns names.

    Raises:
        ValueError: a column for an argument that no loss has or that no column can give, or a
            required tensor that neither the loop nor a column can give.
    """
    found: dict[str, Extra] = {}
    known = set(roles_of(records, config))
    for record in records:
        rule = rule_of(record)
        states = () if rule is None else rule.supplies
        own = () if rule is None else rule.columns
        filled = (*filled_here(record), *states, *supplied(config))
        # a number that no loss takes per row stays a loss argument
        tensors = [n for n, p in losses.arguments(record).items() if "Tensor" in str(p.annotation)]
        readable = [name for name in (*tensors, *own) if name in KINDS]
        known |= set(readable)
        for name in (*losses.required(record), *readable):
            needed = name in losses.required(record) and name not in (*filled, *COMPUTED)
            wanted = needed or name in own or name in config.columns
            if not wanted or name in config.loss_args or name in found:
                continue
            if name not in KINDS:
                gone = {*filled, *COMPUTED, *KINDS}
                lacking = " and ".join(n for n in losses.required(record) if n not in gone)
                raise ValueError(
                    f"loss {record.name!r} needs {lacking}, which this trainer does not supply; "
                    "call prefkern.preference_loss from a loop of your own."
                )
            kind = KINDS_OF_LOSS.get((record.name, name), KINDS[name])
            found[name] = Extra(name, kind, config.columns.get(name, name), record.name)
    for name in config.columns:
        if name not in known:
            near = nearest(name, known) or f"; known: {', '.join(sorted(known)) or 'none'}"
            raise ValueError(
                f"columns: loss {', '.join(config.loss)} reads no column for {name!r}{near}."
            )
    return list(found.values())


def given_by_user(config: TrainConfig) -> frozenset[str]:
    """Arguments that a state must not replace."""
    return frozenset(config.loss_args) | frozenset(config.columns)


def needs_labels(records: Sequence[Loss]) -> bool:
    return any("desirable" in record.extra for record in records)


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
    if not config.likelihood_prompt:
        return None
    if all(record.supervised is None for record in records):
        raise ValueError(
            f"likelihood_prompt: loss {', '.join(config.loss)} has no likelihood term; drop it."
        )
    return likelihood_row(records)


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


def step_arguments(
    records: Sequence[Loss], given: Mapping[str, object], examples: list[Example]
) -> dict[str, float]:
    """Loss arguments that make means over tokens or pairs those of the whole step: with them a
    step is the same for any split into micro-batches and processes."""
    takes = {name for record in records for name in losses.arguments(record)}
    wanted = (takes & STEP_ARGUMENTS) - set(given)
    groups, sequences = len(examples), [s for e in examples for s in e.sequences]
    made = {
        "tokens_per_sequence": lambda: sum(s.length for s in sequences) / len(sequences),
        "tokens_per_group": lambda: sum(e.sequences[0].length for e in examples) / groups,
        "chosen_tokens": lambda: sum(e.sequences[0].length for e in examples) / groups,
        "rejected_tokens": lambda: sum(e.sequences[1].length for e in examples) / groups,
        "pairs_per_sequence": lambda: sum(map(_level_pairs, examples)) / len(sequences),
    }
    return {name: made[name]() for name in sorted(wanted)}


def _level_pairs(example: Example) -> int:
    """Ordered pairs of answers of different preference levels."""
    levels = (example.values or {})["preference_levels"]
    return sum(a < b for a in levels for b in levels)
