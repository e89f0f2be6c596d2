"""What a loss takes: read off its signature, and what is said of a value that does not fit."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import is_number
from ..stats import SeqStats, TokenStats
from .foreign_names import FOREIGN, of_family

# Arguments of a weight stage that preference_loss supplies: cu_seqlens [S+1], scored [N] bool,
# sign [N] +1 chosen / -1 rejected, public_length [S], ref_logp [N], logp [N] detached.
STAGE_INPUTS = frozenset({"cu_seqlens", "scored", "sign", "public_length", "ref_logp", "logp"})


_FIELDS = frozenset(SeqStats._fields)


class Kind(NamedTuple):
    """What a parameter may be, from its annotation."""

    exact: frozenset[type]  # types that need no further look
    parts: tuple[str, ...]  # the annotation, split at |

    @property
    def words(self) -> str:
        return " or ".join(_KINDS[part].words if part in _KINDS else part for part in self.parts)

    def fits(self, value: object) -> bool:
        """Whether `value` may be given; an annotation that is not known here takes anything."""
        return type(value) in self.exact or any(
            part not in _KINDS or _KINDS[part].accepts(value) for part in self.parts
        )


class _Part(NamedTuple):
    words: str
    exact: tuple[type, ...]
    accepts: Callable[[Any], bool]


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, torch.SymBool))


def _is_integer(value: Any) -> bool:
    whole = isinstance(value, (numbers.Integral, torch.SymInt))
    return whole and not _is_bool(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_number, value))


_KINDS = {
    "None": _Part("None", (type(None),), lambda value: value is None),
    "bool": _Part("True or False", (bool,), _is_bool),
    "int": _Part("an integer", (int,), _is_integer),
    "float": _Part("a number", (float, int), is_number),
    "str": _Part("a string", (str,), lambda value: isinstance(value, str)),
    "Tensor": _Part("a tensor", (Tensor,), lambda value: isinstance(value, Tensor)),
    "SeqStats": _Part("a SeqStats", (SeqStats,), lambda value: isinstance(value, SeqStats)),
    "TokenStats": _Part("a TokenStats", (TokenStats,), lambda value: isinstance(value, TokenStats)),
    "Sequence[float]": _Part("a list of numbers", (), _are_numbers),
    "tuple[float, float]": _Part("two numbers", (), lambda v: _are_numbers(v) and len(v) == 2),
}


@functools.cache
def kind_of(annotation: Any) -> Kind:
    """The kind of an annotation, a string or an object."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    parts = tuple(part.strip().removeprefix("torch.") for part in text.split("|"))
    exact = {t for part in parts if part in _KINDS for t in _KINDS[part].exact}
    return Kind(frozenset(exact), parts)


class LossInputs(NamedTuple):
    """Everything a loss takes, by who gives it."""

    positional: tuple[str, ...]
    keywords: dict[str, inspect.Parameter]  # of the function
    stage: dict[str, inspect.Parameter]  # of the weight stage, given by preference_loss or not
    arguments: dict[str, inspect.Parameter]  # that a caller of preference_loss may pass
    extra: tuple[str, ...]  # tensors of the function that a caller or preference_loss supplies
    stage_extra: tuple[str, ...]  # tensors of the weight stage that a caller supplies
    required: tuple[str, ...]  # keywords without a default
    kinds: dict[str, Kind]  # of all of them
    exact: dict[str, frozenset[type]]  # types of each that need no further look

    @classmethod
    def of(
        cls, fn: Callable[..., Any], stage: Callable[..., Any] | None, weight: Any
    ) -> LossInputs:
        """Read off the signatures; `weight` is the Supervised of the loss, or None."""
        own = inspect.signature(fn).parameters
        of_stage = {} if stage is None else dict(inspect.signature(stage).parameters)
        keywords = {k: p for k, p in own.items() if p.kind is p.KEYWORD_ONLY}
        arguments = dict(keywords)
        for name, parameter in of_stage.items():
            if name not in STAGE_INPUTS:
                arguments.setdefault(name, parameter.replace(kind=parameter.KEYWORD_ONLY))
        if weight is not None:
            arguments[weight.argument] = inspect.Parameter(
                weight.argument, inspect.Parameter.KEYWORD_ONLY, default=weight.default,
                annotation="float",
            )  # fmt: skip
        kinds = {k: kind_of(p.annotation) for k, p in {**of_stage, **arguments, **own}.items()}
        return cls(
            tuple(k for k in own if k not in keywords),
            keywords,
            of_stage,
            arguments,
            tuple(k for k, p in keywords.items() if _is_open(p) or _is_filled(p)),
            tuple(k for k, p in of_stage.items() if _is_open(p) and k not in STAGE_INPUTS),
            tuple(k for k, p in keywords.items() if _is_open(p)),
            kinds,
            {name: kind.exact for name, kind in kinds.items()},
        )


def _is_open(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def _is_filled(parameter: inspect.Parameter) -> bool:
    """A tensor that is a field of SeqStats: the objective fills it in."""
    return parameter.name in _FIELDS and "Tensor" in str(parameter.annotation)


def check_row(name: str, row: object) -> None:
    """Refuses statistics of different shapes, which would broadcast, and what holds no numbers."""
    if isinstance(row, Tensor):
        if row.dtype == torch.bool or row.is_complex():
            raise ValueError(f"{name} must hold real numbers, got {row.dtype}.")
    elif isinstance(row, (SeqStats, TokenStats)):
        first, shape = "", None
        for field, value in zip(row._fields, row, strict=True):
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name}.{field} must be a tensor or None, got {type(value).__name__}."
                )
            check_row(f"{name}.{field}", value)
            if shape is None:
                first, shape = field, value.shape
            elif value.shape != shape:
                raise ValueError(
                    f"{name}.{field} must have the shape of {name}.{first} {list(shape)}, got "
                    f"{list(value.shape)}."
                )


# ---- messages ------------------------------------------------------------------------------------


def unknown(names: str, family: str, known: Iterable[str], given: str) -> str:
    """Of an argument that no loss of `names` takes."""
    hint = of_family(given, family) or FOREIGN.get(given)
    if hint is not None:
        hint = f"write {hint} instead"
    else:
        every = tuple(known)
        near = difflib.get_close_matches(given, every, n=3) or every
        hint = f"nearest: {', '.join(near) or 'none'}"
    return f"loss {names} has no argument {given!r}; {hint}."


def missing(names: Iterable[str], meanings: Mapping[str, str]) -> str:
    """Of tensors that a loss needs and did not get: what each of them is."""
    told = [f"{name} ({meanings.get(name, '').rstrip('.') or 'a tensor'})" for name in names]
    return f"needs {' and '.join(told)}; pass {'it' if len(told) == 1 else 'them'} by name."


def misfit(name: str, kind: Kind, value: object, meaning: str, reads: Iterable[str]) -> str:
    """Of a value of another kind than its parameter."""
    got = type(value).__name__
    if isinstance(value, str):
        got = f"the string {value!r}"
    elif isinstance(value, Tensor):
        got = f"a tensor {list(value.shape)}"
    elif value is None or isinstance(value, (bool, int, float)):
        got = repr(value)
    advice = ""
    if "SeqStats" in kind.parts or "TokenStats" in kind.parts:
        fields = ", ".join(f"{field}=..." for field in reads)
        advice = f"; build one: prefkern.{kind.parts[0]}({fields})"
    elif isinstance(value, str) and {"float", "int"} & set(kind.parts) and _reads_as_number(value):
        advice = "; write it without quotes"
    elif "Tensor" in kind.parts and meaning:
        advice = f"; it is: {meaning.rstrip('.')}"
    elif "bool" in kind.parts:
        advice = f"; write {name}=True or {name}=False"
    return f"{name} must be {kind.words}, got {got}{advice}."


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
