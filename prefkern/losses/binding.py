"""From names to losses, and from a call's arguments to who takes each of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import core, inline
from .docstrings import meanings
from .inputs import missing, unknown
from .record import LOSSES, Loss
from .rehearsal import rehearse

# A loss is named (or by a TRL loss_type), or given as its record or its function.
LossLike = str | Loss | Callable[..., Any]

# TRL's loss_type values (those of its CPO, KTO and TPO trainers included) that are not names here:
# our loss and the arguments that make it theirs. Values with the same name need no row.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {}),
    "sigmoid_norm": ("ln_dpo", {}),
    "sppo_hard": ("sppo", {}),
    "aot_pair": ("aot", {}),
    "aot_unpaired": ("aot", {"paired": False}),
    "tpo-l": ("tpo_l", {}),
}


class Bound(NamedTuple):
    """Arguments of one loss call, sorted by who takes them."""

    args: dict[str, Any]  # of the loss function
    stage: dict[str, Any]  # of the weight stage
    supervised: float  # weight of the likelihood term, its scale applied; 0 where there is none
    hyper: dict[str, Any]  # every hyper-parameter of function and stage, defaults filled in
    stats: tuple[str, ...]  # token statistics to ask the ops for
    needs_reference: bool


def resolve(loss: LossLike) -> tuple[Loss, dict[str, Any]]:
    """The loss of that name or TRL alias, and the arguments that the alias fixes or that stand
    behind the name ("tdpo2:alpha=0.5, beta=0.2").

    Raises:
        ValueError: unknown name (nearest names given), arguments that cannot be read, something
            that is no loss.
    """
    if isinstance(loss, Loss):
        return loss, {}
    if not isinstance(loss, str):
        record = LOSSES.get(getattr(loss, "__name__", ""))
        if record is None or record.fn is not loss:
            raise ValueError(
                f"loss must be a name of prefkern.LOSSES or a function of prefkern.losses, got "
                f"{loss!r}; declare your own with a decorator of prefkern.losses.declare."
            )
        return record, {}
    loss, own = inline.split(loss)
    target, fixed = ALIASES.get(loss, (loss, {}))
    if target not in LOSSES:
        known = (*LOSSES, *ALIASES)
        spelled = loss.lower().replace("-", "_").replace(" ", "_")
        near = difflib.get_close_matches(spelled, known, n=3)
        near = near or [name for name in known if spelled and spelled in name][:3]
        hint = f"nearest: {', '.join(near)}" if near else "`prefkern losses` lists them"
        raise ValueError(f"unknown loss {loss!r}; {hint}.")
    return LOSSES[target], {**fixed, **own}


def arguments(loss: LossLike) -> dict[str, inspect.Parameter]:
    """Keyword arguments a caller of preference_loss may pass to the loss: its function's, its
    weight stage's (less those preference_loss supplies) and its supervised weight."""
    return resolve(loss)[0].inputs.arguments


def required(loss: LossLike) -> tuple[str, ...]:
    """Names of the tensors that must come with a call of the loss."""
    record = resolve(loss)[0]
    return record.extra + record.inputs.stage_extra


def check_arguments(records: Sequence[Loss], names: Iterable[str]) -> None:
    """Refuses names that none of the losses takes as an argument.

    Raises:
        ValueError: with the nearest names, and ours where another library's name came.
    """
    known = {name: None for record in records for name in arguments(record)}
    for name in names:
        if name not in known:
            who = " or ".join(repr(record.name) for record in records)
            raise ValueError(unknown(who, "", known, name))


def bind(loss: LossLike, given: Mapping[str, Any], *, supplied: Iterable[str] = ()) -> Bound:
    """Sorts the loss arguments `given` by who takes them, refusing what nobody takes.

    An argument that function and weight stage share (beta, say) goes to both. `supplied` names
    required tensors that the caller adds itself afterwards.

    Raises:
        ValueError: an unknown argument (nearest names given), one of another kind or out of range,
            or a required one that is missing.

    Warns:
        UserWarning: the first time a provisional loss is bound.
    """
    record, fixed = resolve(loss)
    given = {**fixed, **given}
    record.warn_if_provisional()
    check_arguments([record], given)
    there = {*given, *supplied}
    if lacking := [name for name in required(record) if name not in there]:
        raise ValueError(f"loss {record.name!r} {missing(lacking, meanings(record))}")
    data = set(required(record))
    hyper = {
        name: given.get(name, parameter.default)
        for name, parameter in arguments(record).items()
        if name not in data and (name in given or parameter.default is not parameter.empty)
    }
    try:
        record.check_values((), given)
        if record.supervised is not None:
            name = record.supervised.argument
            core.not_negative(name, hyper[name])
        rehearse(record, hyper)
    except ValueError as error:
        raise ValueError(f"loss {record.name!r}: {error}") from error
    weight = 0.0
    if record.supervised is not None:
        weight = float(hyper[record.supervised.argument])
        if record.supervised.scale is not None:
            weight *= hyper[record.supervised.scale]
    unused = hyper.get("reference_free", False) or (
        isinstance(record.reference, str) and hyper[record.reference] == 0
    )
    return Bound(
        args={k: v for k, v in given.items() if k in record.inputs.keywords},
        stage={k: v for k, v in given.items() if k in record.inputs.stage},
        supervised=weight,
        hyper=hyper,
        stats=record.statistics(**hyper),
        needs_reference=record.needs_reference and not unused,
    )
