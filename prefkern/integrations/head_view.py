"""What a computation at the head reads, and what `at_head` notes of a model.

Shapes: B rows of T tokens, D hidden size, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head import Head
from . import hf
from .output_layer import OutputLayer

IGNORE = -100


class View(NamedTuple):
    """What a computation at the head reads; the head is valid inside the head's call only."""

    hidden: Tensor  # [B, T, D]
    head: Head  # weight, bias, scale, soft cap, adapters as low_rank terms
    layers: Tensor | None  # [L, B, T, D] after every block, with output_hidden_states=True
    source: OutputLayer


class Result(NamedTuple):
    """What a call with at_head= returns."""

    value: Any  # what fn returned
    aux_loss: Tensor | None  # of a mixture's routers, where they are asked for


Compute = Callable[[View], Any]


class HeadState:
    """What at_head notes of a model."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain  # the forward that was there
        self.packed = False
        self.probed = False
        self.guard: Callable[[], None] | None = None


def guard(model: Any, check: Callable[[], None] | None) -> None:
    """`check` runs before every call with at_head=: an adapter raises there where it was called in
    a way that would train wrongly. None takes it away."""
    installed(model).guard = check


@contextmanager
def padded(model: Any) -> Iterator[bool]:
    """Within the block padding stays in; gives whether it is taken out outside."""
    state = installed(model)
    packed, state.packed = state.packed, False
    try:
        yield packed
    finally:
        state.packed = packed


NOTE = "_prefkern_at_head"  # where a model carries its HeadState


def state_of(base: Any) -> HeadState | None:
    """What at_head noted of this model itself: a deep copy of it has its own."""
    found: HeadState | None = base.__dict__.get(NOTE)
    return found


def installed(model: Any) -> HeadState:
    state = state_of(hf.causal_lm(model))
    if state is None:
        raise ValueError(f"{type(model).__name__} has no at_head=; call at_head(model) before.")
    return state


def shifted(labels: Tensor) -> Tensor:
    """labels [B, T] -> the next token's label at every position [B, T], IGNORE at the last."""
    last = labels.new_full((labels.shape[0], 1), IGNORE)
    return torch.cat([labels[:, 1:], last], 1)
