"""Preference losses: pure functions, one short file per paper, and their registry LOSSES.

A file of a family folder declares its losses as `Loss` records; this module collects them, so a new
loss is a new file. `prefkern.losses.<name>` is the record, which is called like its function.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import diffusion, listwise, pairwise, pointwise, tokenwise
from .foreign_names import FOREIGN
from .record import Loss

FAMILIES = (pairwise, pointwise, listwise, tokenwise, diffusion)


def _collect() -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    for family in FAMILIES:
        for info in pkgutil.iter_modules(family.__path__):
            module = importlib.import_module(f"{family.__name__}.{info.name}")
            for record in vars(module).values():
                if not isinstance(record, Loss) or record.fn.__module__ != module.__name__:
                    continue
                if found.setdefault(record.name, record) is not record:
                    raise AssertionError(f"two losses are named {record.name!r}")
    return dict(sorted(found.items()))


LOSSES: dict[str, Loss] = _collect()

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


def resolve(name: str) -> tuple[Loss, dict[str, Any]]:
    """The loss of that name or TRL alias, and the arguments the alias fixes.

    Raises:
        ValueError: unknown name (nearest names given).
    """
    target, fixed = ALIASES.get(name, (name, {}))
    if target not in LOSSES:
        known = (*LOSSES, *ALIASES)
        near = difflib.get_close_matches(str(name), known, n=3) or known
        raise ValueError(f"unknown loss {name!r}; nearest: {', '.join(near)}.")
    return LOSSES[target], dict(fixed)


def arguments(record: Loss) -> dict[str, inspect.Parameter]:
    """Keyword arguments a caller may pass to `record`: its function's, its weight stage's (less
    those preference_loss supplies) and its supervised weight."""
    found = _keywords(record.fn)
    if record.weights is not None:
        for name, parameter in inspect.signature(record.weights.fn).parameters.items():
            if name not in record.weights.given:
                found.setdefault(name, parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    if record.supervised is not None:
        found[record.supervised.argument] = inspect.Parameter(
            record.supervised.argument,
            inspect.Parameter.KEYWORD_ONLY,
            default=record.supervised.default,
            annotation="float",
        )
    return found


def required(record: Loss) -> tuple[str, ...]:
    """Names of the tensors that must come with a call of `record`."""
    return record.extra + (() if record.weights is None else record.weights.extra)


def check_arguments(records: Sequence[Loss], names: Iterable[str]) -> None:
    """Refuses names that none of the losses takes as an argument.

    Raises:
        ValueError: with the nearest names, and ours where another library's name came.
    """
    known = {name: None for record in records for name in arguments(record)}
    for name in names:
        if name in known:
            continue
        who = " or ".join(repr(record.name) for record in records)
        if name in FOREIGN:
            hint = f"write {FOREIGN[name]} instead"
        else:
            near = difflib.get_close_matches(name, known, n=3) or tuple(known)
            hint = f"nearest: {', '.join(near) or 'none'}"
        raise ValueError(f"loss {who} has no argument {name!r}; {hint}.")


def bind(record: Loss, given: Mapping[str, Any], *, supplied: Iterable[str] = ()) -> Bound:
    """Sorts the loss arguments `given` by who takes them, refusing what nobody takes.

    An argument that function and weight stage share (beta, say) goes to both. `supplied` names
    required tensors that the caller adds itself afterwards.

    Raises:
        ValueError: an unknown argument (nearest names given) or a required one that is missing.

    Warns:
        UserWarning: the first time a provisional loss is bound.
    """
    record.warn_if_provisional()
    known = arguments(record)
    check_arguments([record], given)
    missing = [n for n in required(record) if n not in given and n not in set(supplied)]
    if missing:
        raise ValueError(
            f"loss {record.name!r} needs the arguments {missing} (tensors): pass them by name, or "
            "None "
            "where its documentation allows it."
        )
    data = set(required(record))
    hyper = {
        name: given.get(name, parameter.default)
        for name, parameter in known.items()
        if name not in data and (name in given or parameter.default is not parameter.empty)
    }
    weight = 0.0
    if record.supervised is not None:
        weight = float(hyper[record.supervised.argument])
        if record.supervised.scale is not None:
            weight *= hyper[record.supervised.scale]
    unused = hyper.get("reference_free", False) or (
        record.reference_weight != "" and hyper[record.reference_weight] == 0
    )
    own = _keywords(record.fn)
    stage = (
        set() if record.weights is None else set(inspect.signature(record.weights.fn).parameters)
    )
    return Bound(
        args={k: v for k, v in given.items() if k in own},
        stage={k: v for k, v in given.items() if k in stage},
        supervised=weight,
        hyper=hyper,
        stats=record.stats if record.stats_for is None else record.stats_for(**hyper),
        needs_reference=record.needs_reference and not unused,
    )


def _keywords(fn: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(fn).parameters
    return {k: p for k, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def __getattr__(name: str) -> Loss:
    if name in LOSSES:
        return LOSSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *LOSSES]
