"""The files of examples/ as modules."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

from doc_blocks import ROOT

FOLDER = ROOT / "examples"


@contextlib.contextmanager
def example_files(*, one_start: bool = False) -> Iterator[Callable[[str], ModuleType]]:
    """A function from the name of an example to its module; examples import their neighbours.

    one_start: a starting model of `tiny` is trained once for all that ask for it.
    """
    sys.path.insert(0, str(FOLDER))
    try:
        with _shared_start() if one_start else contextlib.nullcontext():
            yield _load
    finally:
        sys.path.remove(str(FOLDER))


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _shared_start() -> Iterator[None]:
    import tiny

    begin = tiny.start
    kept: dict[tuple, object] = {}

    def start(*args, **size):
        key = (args, *sorted(size.items()))
        if key not in kept:
            kept[key] = begin(*args, **size)
        return copy.deepcopy(kept[key])

    tiny.start = start
    try:
        yield
    finally:
        tiny.start = begin
