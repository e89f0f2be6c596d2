"""What a tracing compiler is told of our functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_result(fn: F) -> F:
    """Called while a graph is traced, with what the call then has; its result is a constant of the
    graph. torch.compiler.assume_constant_result without its import of torch._dynamo, which takes
    1.2 s and brings triton."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
