"""Hyper-parameters are tried on two tiny rows before any model runs.

The ranges of a loss stand in its function (and its weight stage's), the formula's one place. Called
on statistics made here, the function says of a value what it would say at the first step, after the
forward of every model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends.choice import use_backend
from ..stats import ONE_MODEL_STATS, TWO_MODEL_STATS, SeqStats, TokenStats, parse_stats
from .record import Loss

Form = tuple[tuple[int, ...], str]  # shape of the tensors, and the one that is turned (`_error`)
# Shapes of the tensors that a loss requires, tried in turn: one number per item, one for all, one
# column per item, one column per item of another model.
_SHAPES: tuple[tuple[int, ...], ...] = ((2,), (), (2, 1))
_forms: dict[Loss, Form] = {}  # the form that a loss was seen to take
# Calls that went through: (loss, its hyper-parameters). Emptied when full: schedules change a value
# at every step.
_passed: set[tuple[Any, ...]] = set()
_MOST = 4096


def rehearse(record: Loss, hyper: Mapping[str, Any]) -> None:
    """Refuses hyper-parameters that the loss would refuse at its first step.

    A loss that two rows of one token cannot serve (one of the caller's, with inputs of its own) is
    not tried. Tensors among the hyper-parameters are left to the step, but for one number on a CPU.

    Raises:
        ValueError: what the loss or its weight stage says of a value; a number that is not finite.
    """
    if torch.compiler.is_compiling():
        return
    given = {k: _plain(v) for k, v in hyper.items()}
    given = {k: v for k, v in given.items() if not isinstance(v, Tensor)}
    try:
        key = (record, *given.items())
        if key in _passed:
            return
    except TypeError:  # a list among them
        key = ()
    _try(record, given)
    if key:
        if len(_passed) >= _MOST:
            _passed.clear()
        _passed.add(key)


def _plain(value: Any) -> Any:
    """The number of a 0-d tensor that can be read here."""
    single = isinstance(value, Tensor) and value.dim() == 0 and checks.readable(value)
    return value.item() if single else value


def _try(record: Loss, given: Mapping[str, Any]) -> None:
    every = (*ONE_MODEL_STATS, *TWO_MODEL_STATS, "ev")
    if asked := record.statistics(**given):
        parse_stats(asked, allowed=every)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), use_backend("eager"):
        form = _forms.get(record)
        if form is None:
            every_form = (form for shape in _SHAPES for form in _others(record, {}, shape))
            form = next((form for form in every_form if _error(record, {}, *form) is None), None)
        if form is not None:
            _forms[record] = form
            error = _error(record, given, *form)
            others = _others(record, given, form[0])
            if error and all(_error(record, given, *other) for other in others):
                raise ValueError(_text(record, error)) from error
    record.check_finite(given)


def _others(record: Loss, given: Mapping[str, Any], shape: tuple[int, ...]) -> Iterator[Form]:
    """Further forms of the tensors, where hyper-parameters ask for them: one column per entry of a
    list among them, or per further entry; a tensor that may be None being None, or there."""
    lengths = {len(value) for value in given.values() if isinstance(value, (list, tuple))}
    inputs = record.inputs
    optional = [
        name
        for name in (*inputs.stage_extra, *inputs.keywords)
        if {"None", "Tensor"} <= set(inputs.kinds[name].parts) and given.get(name) is None
    ]
    for form in (shape, *((2, n - less) for n in sorted(lengths) for less in (0, 1) if n > less)):
        yield from ((form, turned) for turned in ("", *optional))


def _text(record: Loss, error: Exception) -> str:
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return text.removeprefix(f"loss {record.name!r}: ")


def _error(
    record: Loss, given: Mapping[str, Any], shape: tuple[int, ...], turned: str = ""
) -> Exception | None:
    """What the loss and its weight stage raise on rows of one token with these arguments; the
    tensor `turned` is None in the stage and there in the loss, where it may be."""
    inputs = record.inputs
    try:
        with torch.device("cpu"):
            further = {turned: _tensor(turned, (2,))} if turned in inputs.keywords else {}
            own = {k: v for k, v in given.items() if k in inputs.keywords}
            _call(record, own | further, shape)
            if record.weights is not None:
                record.weights(**{
                    name: given[name] if name in given
                    else None if name == turned else _tensor(name, (2,))
                    for name, parameter in inputs.stage.items()
                    if name in given or parameter.default is parameter.empty
                })  # fmt: skip
    except Exception as error:
        return error
    return None


def _call(record: Loss, given: dict[str, Any], shape: tuple[int, ...]) -> None:
    required = {name: _tensor(name, shape) for name in record.extra if name not in given}
    positional = record.inputs.positional
    rows: list[Any]
    match record.family:
        case "listwise":
            rows = [_tensor("scores", (2,)), _tensor("relevance", (2,)), _tensor("cu_groups", ())]
        case "tokenwise":
            stats = TokenStats(*(_tensor("", (2,)) for _ in TokenStats._fields))
            rows = [stats, _tensor("cu_seqlens", ())]
        case "diffusion":
            rows = [_tensor("", shape or (2,)) for _ in positional]
        case _:
            rows = [SeqStats(*(_tensor("", (2,)) for _ in SeqStats._fields)) for _ in positional]
    record.fn(*rows, **required, **given)


def _tensor(name: str, shape: tuple[int, ...]) -> Any:
    """A value for the tensor `name`: fp64 halves, but where the name says a label or a position."""
    match name:
        case "desirable":
            return torch.tensor([True, False])
        case "keep" | "scored":
            return torch.tensor([True, True])
        case "relevance":
            return torch.tensor([1.0, 0.0], dtype=torch.float64)
        case "sign":
            return torch.tensor([1.0, -1.0], dtype=torch.float64)
        case "cu_groups":
            return torch.tensor([0, 2], dtype=torch.int32)
        case "cu_seqlens":
            return torch.tensor([0, 1, 2], dtype=torch.int32)
        case "pairs":
            return torch.tensor([[0, 1], [0, 1]])
        case "source":
            return torch.zeros(1, dtype=torch.int64)
        case "topk":
            return torch.ones(1, dtype=torch.int64)
        case "step_index" | "hook_type":
            return torch.zeros(2, dtype=torch.int64)
        case "activations":
            return torch.full((2, 2), 0.5, dtype=torch.float64)
        case _:
            return torch.full(shape, 0.5, dtype=torch.float64)
