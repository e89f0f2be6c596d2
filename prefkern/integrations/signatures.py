"""Functions of other libraries are checked before they are overridden or swapped."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def imported(path: str, tested: str) -> Any:
    """The object at "module:name.name".

    Raises:
        ImportError: it is not there; the message names the version that was read.
    """
    module, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{path} is not there ({error}); this adapter knows {tested}.") from error
    return found


def check(function: Callable[..., Any], want: Sequence[str], tested: str) -> None:
    """Refuses a function whose parameters are not `want`, in this order and without others.

    Raises:
        ImportError: they are not; the message names the version that was read.
    """
    got = tuple(inspect.signature(function).parameters)
    if got != tuple(want):
        name = getattr(function, "__qualname__", repr(function))
        raise ImportError(
            f"{name} takes {got}, where this adapter knows {tuple(want)} ({tested}); install that "
            "version."
        )
