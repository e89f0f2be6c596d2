"""How a loss declares itself: the pure function and what it must be fed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenWeights(NamedTuple):
    """What a weight stage returns.

    `weights` is one [N] tensor for every statistic or a dict statistic -> [N]; a missing key means
    weight 1, and "logp" weighs `ref_logp` too (log-ratios are weighted as differences). `penalty`
    [S] fp64 is added to the loss over the loss's own denominator.
    """

    weights: Tensor | dict[str, Tensor]
    penalty: Tensor | None = None


class WeightStage(NamedTuple):
    """Token weights that a loss asks for: a function of prefkern.losses.weights or
    prefkern.losses.weights, called by name.

    `given` names the arguments preference_loss supplies (cu_seqlens [S+1], scored [N] bool,
    sign [N] +1 chosen / -1 rejected, public_length [S], ref_logp [N], logp [N] detached), `extra`
    the tensors the caller must pass. Other parameters are hyper-parameters with defaults.
    """

    fn: Callable[..., TokenWeights]
    given: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Loss:
    """Declaration of a loss: the pure function and what it must be fed.

    A record is called like its function; a ValueError then names the loss, and the first call of a
    provisional one warns. `stats` are the token statistics the loss reads through SeqStats (or
    TokenStats); `ref_logp` follows from `needs_reference`.
    """

    fn: Callable[..., Any]
    name: str
    family: str  # folder: pairwise, pointwise, listwise, tokenwise, diffusion
    stats: tuple[str, ...] = ("logp",)
    needs_reference: bool = False
    extra: tuple[str, ...] = ()  # keyword tensors a caller must supply
    status: str = ""  # how the formula is known
    source: str = ""  # paper and equation
    rows: tuple[str, ...] = ("chosen", "rejected")  # pairwise: the sequences of one group, in order
    score: str = "logratio"  # listwise: SeqStats property handed over as `scores`
    weights: WeightStage | None = None
    supervised: Supervised | None = None
    stats_for: Callable[..., tuple[str, ...]] | None = None  # stats that depend on hyper-parameters
    rewards: Callable[..., Tensor] | None = None  # rewards(seq, **hyper), what metrics log
    logps: str = "logp"  # SeqStats property logged as logps/*
    update: Callable[..., Any] | None = None  # stateful losses: update(state, ...) -> state
    # Denominator of preference_loss where it is not the family's own (pairs, sequences, groups).
    items: str = ""
    reference_weight: str = ""  # hyper-parameter that, at 0, makes the reference superfluous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.warn_if_provisional()
        try:
            return self.fn(*args, **kwargs)
        except ValueError as error:
            raise ValueError(f"loss {self.name!r}: {error}") from error

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
            stacklevel=3,
        )


_warned: set[str] = set()  # names of the provisional losses that have said so
