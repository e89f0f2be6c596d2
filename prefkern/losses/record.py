"""What a loss says of itself (`Loss`), and the register of all losses (`LOSSES`)."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, traced
from .docstrings import meanings
from .inputs import LossInputs, check_row, misfit, missing, unknown


class TokenWeights(NamedTuple):
    """What a weight stage returns.

    `weights` is one [N] tensor for every statistic or a dict statistic -> [N]; a missing key means
    weight 1, and "logp" weighs `ref_logp` too (log-ratios are weighted as differences). `penalty`
    [S] fp64 is added to the loss over the loss's own denominator.
    """

    weights: Tensor | dict[str, Tensor]
    penalty: Tensor | None = None


class Supervised(NamedTuple):
    """A likelihood term that preference_loss adds: weight * NLL(rows) with its own denominator.

    mode "token": sum of NLL over the number of tokens; "seq": mean over sequences of NLL / length;
    "sum": mean over sequences of NLL.
    """

    argument: str  # name of the weight among the loss arguments
    default: float
    rows: str = "chosen"
    mode: str = "token"
    scale: str | None = None  # a hyper-parameter that multiplies the weight
    alone: bool = False  # the loss is this term and nothing else: it trains on single answers too


class Part(NamedTuple):
    """What makes a loss its method beside the tensors it reads, and what a run without it is."""

    name: str  # what supplies it in a trainer calls it so
    without: str  # a clause: what is trained where it is absent
    how: str  # what has it, in words of a trainer's options
    refused: bool = False  # a run without it would be another method under the name


_LARGEST = sys.float_info.max
# Labels of gains 2^y - 1: negative gains turn the ideal DCG and with it the loss around; from 64 on
# the gradient's norm overflows in fp32, and 30 leaves room for the sums.
GRADES = (0.0, 30.0)
SHARES = (0.0, float("inf"))
Labels = tuple[float, float] | Callable[..., tuple[float, float] | None] | None


@dataclass(frozen=True, eq=False, repr=False)
class Loss:
    """A declared loss: the function and what it must be fed. Called like its function.

    Name, rows and the tensors a caller must supply are read off the signature (`inputs`).
    """

    fn: Callable[..., Any]  # checks its arguments and names the loss in its errors
    family: str  # folder: pairwise, pointwise, listwise, tokenwise, diffusion
    source: str  # paper and equation
    status: str  # how the formula is known
    # Fields of SeqStats (or TokenStats) that the function reads beside ref_logp, or a function of
    # the hyper-parameters that gives them, a statistic's parameter included ("jsd:0.5").
    reads: tuple[str, ...] | Callable[..., tuple[str, ...]]
    reference: bool | str  # needs one; a name: of the hyper-parameter that at 0 makes it needless
    score: str  # SeqStats property: lists get it as `scores`, metrics of pairs log it as logps/*
    rewards: Callable[..., Tensor]  # rewards(seq, **hyper), what metrics log
    items: str  # denominator of preference_loss, a key of num_items
    weights: Callable[..., TokenWeights] | None = None  # stage of prefkern.losses.weights
    supervised: Supervised | None = None
    update: Callable[..., Any] | None = None  # stateful losses: update(state, ...) -> state
    # Fields of `reads` that it reads otherwise than the rest: "constant", without gradient;
    # "whole", over likelihood_targets where they are given.
    read_as: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()  # without which a trainer's run is not the method
    # Lowest and highest relevance that the formula is made for, or a function of the
    # hyper-parameters that gives them; None: any.
    labels: Labels = None
    inputs: LossInputs = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", LossInputs.of(self.fn, self.weights, self.supervised))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.family} loss {self.name!r}>"

    def check_values(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Refuses a value of a kind that its parameter does not take, statistics that do not
        belong together and positional tensors that hold no numbers; unknown names pass."""
        exact, kinds, rows = self.inputs.exact, self.inputs.kinds, self.inputs.positional
        given = (*zip(rows, args, strict=False), *kwargs.items())
        for name, value in given:
            if name not in exact or type(value) in exact[name] or kinds[name].fits(value):
                if name in rows:
                    check_row(name, value)
                continue
            reads = self.reads if isinstance(self.reads, tuple) else self.reads()
            fields = ["logp", "ref_logp", *reads] if self.needs_reference else reads
            every = dict.fromkeys(field.partition(":")[0] for field in fields)
            raise ValueError(misfit(name, kinds[name], value, meanings(self).get(name, ""), every))

    def check_finite(self, kwargs: Mapping[str, object]) -> None:
        """Refuses numbers that are not finite where the function has no range of its own."""
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.dim() == 0 and checks.readable(value):
                value = value.item()
            if type(value) in (int, float) and not -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]
                raise ValueError(f"{name} must be a finite number, got {value!r:.20}.")

    def call_error(self, args: Sequence[object], kwargs: Mapping[str, object]) -> str | None:
        """What a call of the function left out, or gave and should not have; None if neither."""
        known = (*self.inputs.positional, *self.inputs.keywords)
        for name in kwargs:
            if name in self.inputs.arguments and name not in known:
                return (
                    f"loss {self.name!r} takes {name!r} through preference_loss, which applies its "
                    "token weights and likelihood term; the function has neither."
                )
            if name not in known:
                return unknown(repr(self.name), self.family, known, name)
        needed = (*self.inputs.positional[len(args) :], *self.inputs.required)
        if lacking := [name for name in needed if name not in kwargs]:
            return f"loss {self.name!r} {missing(lacking, meanings(self))}"
        return None

    @property
    def name(self) -> str:
        return self.fn.__name__

    def label_range(self, **hyper: Any) -> tuple[float, float] | None:
        """Lowest and highest relevance that the formula is made for; None: any."""
        return self.labels(**hyper) if callable(self.labels) else self.labels

    @property
    def constant(self) -> tuple[str, ...]:
        """Fields that it reads without gradient."""
        return tuple(name for name, how in self.read_as.items() if how == "constant")

    @property
    def whole(self) -> tuple[str, ...]:
        """Fields that it reads over likelihood_targets, where they are given."""
        return tuple(name for name, how in self.read_as.items() if how == "whole")

    @property
    def rows(self) -> tuple[str, ...]:
        """The sequences of one group of a pairwise loss, in order; () elsewhere."""
        return self.inputs.positional if self.family == "pairwise" else ()

    @property
    def alone(self) -> bool:
        """Whether of its rows it reads one alone, and so trains on single answers too."""
        return self.supervised is not None and self.supervised.alone

    @property
    def extra(self) -> tuple[str, ...]:
        """Keyword tensors of the function that the caller or preference_loss must supply."""
        return self.inputs.extra

    @property
    def needs_reference(self) -> bool:
        return self.reference is not False

    def statistics(self, **hyper: Any) -> tuple[str, ...]:
        """Token statistics to ask the ops for, beside ref_logp."""
        reads = self.reads if isinstance(self.reads, tuple) else self.reads(**hyper)
        return tuple(name for name in reads if name != "length")

    @property
    def stats(self) -> tuple[str, ...]:
        """Names of the statistics that the defaults ask for."""
        return tuple(name.partition(":")[0] for name in self.statistics())

    @property
    def provisional(self) -> bool:
        """True where the formula is not known to be the method's."""
        return self.status.startswith("provisional")

    def warn_if_provisional(self) -> None:
        """Once per loss and process; not while tracing, where a warning would end the graph."""
        if not self.provisional or torch.compiler.is_compiling() or self.name in _warned:
            return
        _warned.add(self.name)
        warnings.warn(
            f"loss {self.name!r} is {self.status}. Its formula was not checked against "
            f"{self.source}; do not report its results as that method's.",
            stacklevel=callers_level(),
        )


class Register(Mapping[str, Loss]):
    """All declared losses by name, sorted. Those of the package are imported at the first look, so
    that `import prefkern` does not wait for a hundred files."""

    def __init__(self) -> None:
        self._found: dict[str, Loss] = {}

    def add(self, record: Loss) -> None:
        """Called by the decorators; a loss of the same module is replaced.

        Raises:
            ValueError: a loss of that name in another module.
        """
        name, module = record.name, record.fn.__module__
        before = self._found.get(name, record).fn.__module__
        if before != module:
            raise ValueError(
                f"two losses are named {name!r}: one of {before}, one of {module}; rename one."
            )
        self._found[name] = record

    def _all(self) -> dict[str, Loss]:
        import_losses()
        return self._found

    def __getitem__(self, name: str) -> Loss:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))

    def __len__(self) -> int:
        return len(self._all())


_CATALOGUE = f"{__package__}.catalogue"


@traced.constant_result  # so that a compiled function may be the first to look
def import_losses() -> None:
    """Imports every loss of the package, which registers them; at the second call a look-up."""
    if _CATALOGUE not in sys.modules:
        importlib.import_module(_CATALOGUE)


LOSSES = Register()

_warned: set[str] = set()  # names of the provisional losses that have said so
# A module's __call__ stands between PreferenceLoss and its caller.
_OURS = tuple(
    os.path.dirname(path) + os.sep for path in (os.path.dirname(__file__), torch.__file__)
)


def callers_level() -> int:
    """The `stacklevel` of the first frame outside the package and torch, for the function that
    warns; the outermost frame where there is none."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    return level
