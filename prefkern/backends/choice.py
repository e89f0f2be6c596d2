"""Which code serves an op call. A backend is a module; see `prefkern.backends.contract.Backend`.

Order of authority: the argument `backend=`, then `with use_backend(name):`, then the environment
variable PREFKERN_BACKEND, then the first backend of `order(op)` that can serve the problem.
"""

from __future__ import annotations

import contextvars
import importlib
import logging
import sys
from types import ModuleType

from .. import env
from .contract import Problem

logger = logging.getLogger("prefkern")

# name -> (module, what it is). Earlier rows win under automatic choice.
_ROWS: dict[str, tuple[str, str]] = {
    "cpu": ("prefkern.backends.cpu", "native C++ for CPU"),
    "triton": ("prefkern.kernels", "Triton kernels for GPUs"),
    "cuda": ("prefkern.backends.cuda", "CUDA C++ for NVIDIA GPUs"),
    "eager": ("prefkern.backends.eager", "eager PyTorch, any device, holds full logits"),
}
PRIORITY = tuple(_ROWS)
# An op whose kernels of the first backend come before those of the second: the CUDA list_rank gives
# a short list 8 to 32 lanes and fp32 terms, the Triton one 256 threads and fp64 throughout.
_SOONER = {"list_rank": ("cuda", "triton")}


def order(op: str) -> tuple[str, ...]:
    """Backends in the order in which automatic choice asks them."""
    if op not in _SOONER:
        return PRIORITY
    first, second = _SOONER[op]
    names = [name for name in PRIORITY if name != first]
    names.insert(names.index(second), first)
    return tuple(names)


_override: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "prefkern_backend", default=None
)
_announced: set[tuple[str, str, str]] = set()


def backend_names() -> tuple[str, ...]:
    """Names accepted by `backend=`, besides 'auto'."""
    return PRIORITY


def load_backend(name: str) -> ModuleType:
    """The module of a backend, imported on first use. Importing never fails for a missing part:
    a backend that cannot run says so in `unsupported`."""
    path = _ROWS[_check_name(name)][0]
    return sys.modules.get(path) or importlib.import_module(path)


def unsupported(name: str, problem: Problem) -> list[str]:
    """Reasons why backend `name` cannot serve `problem`; empty when it can."""
    return load_backend(name).unsupported(problem)


def held_back(name: str, problem: Problem) -> list[str]:
    """Reasons why automatic choice leaves out a backend that can serve `problem`: kernels that no
    recorded run has seen, an interpreter. An explicit choice still gets it."""
    module = load_backend(name)
    return module.held_back(problem) if hasattr(module, "held_back") else []


class use_backend:
    """Within the block, op calls with backend='auto' use `name` ('auto' restores automatic choice).

    Works inside compiled code: the choice is then made while tracing.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str) -> None:
        self.name = _check_name(name, auto=True)

    def __enter__(self) -> None:
        self.before = _set_override(self.name)

    def __exit__(self, *error: object) -> None:
        _set_override(self.before)


def _set_override(name: str) -> str:
    """Sets the override; returns what was there."""
    before = _override.get() or "auto"
    _override.set(None if name == "auto" else name)
    return before


# Evaluated while tracing, like the choice itself (ops/shared.choose_backend).
_set_override._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select_backend(problem: Problem, backend: str = "auto") -> str:
    """Name of the backend that serves `problem`.

    Raises:
        ValueError: an explicit choice cannot serve the problem; every backend's reasons are listed.
    """
    _check_name(backend, auto=True)
    asked_by = "backend="
    if backend == "auto":
        backend, asked_by = _override.get() or "auto", "use_backend or backend="
    if backend == "auto":
        backend, asked_by = env.get("PREFKERN_BACKEND") or "auto", "PREFKERN_BACKEND"
        _check_name(backend, auto=True, what="the environment variable PREFKERN_BACKEND")
    if backend != "auto":
        if unsupported(backend, problem):
            raise ValueError(_refusal(problem, f"backend {backend!r} (asked for by {asked_by})"))
        return backend
    for name in order(problem.op):
        reasons = unsupported(name, problem) or held_back(name, problem)
        if not reasons:
            return name
        key = (problem.op, name, reasons[0])
        if key not in _announced:
            _announced.add(key)
            logger.info("backend %s passed over for %s: %s", name, problem, "; ".join(reasons))
    raise ValueError(_refusal(problem, "no backend"))


def explain(problem: Problem) -> tuple[str, str]:
    """(backend that automatic choice takes, why those before it were passed over)."""
    name = select_backend(problem)
    passed = []
    names = order(problem.op)
    for other in names[: names.index(name)]:
        cannot = unsupported(other, problem)
        verb = "cannot" if cannot else "is held back"
        passed.append(f"{other} {verb}: {(cannot or held_back(other, problem))[0]}")
    return name, "; ".join(passed) or "first in order"


def _refusal(problem: Problem, who: str) -> str:
    lines = [f"{who} cannot serve {problem}. Backends:"]
    for name in order(problem.op):
        reasons = unsupported(name, problem)
        if not reasons:
            reasons = ["can serve it", *held_back(name, problem)]
        lines.append(f"  {name}: {'; '.join(reasons)}")
    lines.append(
        "Choose one that can, or backend='auto'. `prefkern env` says how to get a missing one."
    )
    return "\n".join(lines)


def _check_name(name: str, *, auto: bool = False, what: str = "backend") -> str:
    names = ("auto", *PRIORITY) if auto else PRIORITY
    if name not in names:
        raise ValueError(f"{what} must be one of {names}, got {name!r}.")
    return name
