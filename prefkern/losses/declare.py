"""The decorators by which a loss declares itself, one per family (folder and signature).

    @pairwise(source="arXiv 2305.18290 eq. 7", status="checked against ...", reference=True)
    def dpo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]

The name stays a function with its own signature, which checks the kinds of its arguments, names the
loss in its errors and, where provisional, warns once. Its docstring needs a summary, the formula
(l = ...) and the source; `docstrings.complete` adds the meanings of shared arguments (meanings.py),
defaults, what is returned and raised. A loss of your own stands in prefkern.LOSSES like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import core, docstrings
from .diffusion import errors
from .record import LOSSES, Labels, Loss, Part, Supervised, TokenWeights

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Family:
    """A decorator of losses, with what is usual for its family."""

    name: str
    reads: tuple[str, ...]
    score: str
    items: str
    rewards: tuple[Callable[..., Tensor], Callable[..., Tensor]]  # with a reference, and without
    labels: Labels = None

    def made_for(self, labels: Labels) -> Family:
        """The same decorator for a loss that takes labels from the lowest to the highest of two
        numbers alone, or of what its hyper-parameters give; see `Loss.labels`."""
        return replace(self, labels=labels)

    def __call__(
        self,
        *,
        source: str,
        status: str,
        reference: bool | str = False,
        reads: tuple[str, ...] | Callable[..., tuple[str, ...]] | None = None,
        score: str | None = None,
        rewards: Callable[..., Tensor] | None = None,
        items: str | None = None,
        weights: Callable[..., TokenWeights] | None = None,
        supervised: Supervised | None = None,
        update: Callable[..., Any] | None = None,
        read_as: Mapping[str, str] | None = None,
        parts: tuple[Part, ...] = (),
    ) -> Callable[[F], F]:
        """Declares the function below as a loss; the fields are those of `Loss`, None the usual.

        Raises:
            ValueError: a name that another loss has, an argument without a meaning.
        """

        def decorate(fn: F) -> F:
            @functools.wraps(fn)
            def loss(*args: Any, **kwargs: Any) -> Any:
                if provisional:
                    record.warn_if_provisional()
                try:
                    record.check_values(args, kwargs)
                    value = fn(*args, **kwargs)  # says itself what range an argument has
                    if kwargs and not torch.compiler.is_compiling():
                        record.check_finite(kwargs)
                    return value
                except (ValueError, TypeError) as error:
                    if told := record.call_error(args, kwargs):
                        raise TypeError(told) from None
                    if isinstance(error, TypeError):
                        raise
                    raise ValueError(f"loss {fn.__name__!r}: {error}") from error

            record = Loss(
                loss, self.name, source, status,
                self.reads if reads is None else reads, reference, score or self.score,
                rewards or self.rewards[reference is False], items or self.items,
                weights, supervised, update, read_as or {}, parts,
                self.labels,
            )  # fmt: skip
            provisional = record.provisional
            loss.__doc__ = fn.__doc__ = docstrings.complete(record)
            LOSSES.add(record)
            return cast(F, loss)

        return decorate


pairwise = Family(
    "pairwise", ("logp",), "logp", "pairs", (core.logratio_rewards, core.logp_rewards)
)
pointwise = Family(
    "pointwise", ("logp",), "logp", "sequences", (core.logratio_rewards, core.logp_rewards)
)
listwise = Family(
    "listwise", ("logp",), "logratio", "groups", (core.logratio_rewards, core.mean_logp_rewards)
)
tokenwise = Family(
    "tokenwise", ("logp",), "logp", "sequences", (core.logratio_rewards, core.logp_rewards)
)
diffusion = Family("diffusion", (), "", "", (errors.rewards, errors.error_rewards))


def formula(loss: F) -> F:
    """The plain function under a declared loss: for a loss that is another one with fixed
    arguments, which is then checked, named and warned of once."""
    return cast(F, loss.__wrapped__)  # type: ignore[attr-defined]
