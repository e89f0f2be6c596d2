"""Triton kernels, installed as `prefkern.kernels`."""

# The folder sits in the repository root under a name that another distribution owns. Started from
# the root, `import kernels` would find this folder instead; failing here makes a caller that probes
# with try/except see "not installed", which is the truth.
if __name__ == "kernels":
    raise ImportError(
        "this `kernels` folder holds the sources of prefkern.kernels and is not the package "
        "`kernels`; import prefkern.kernels (after `pip install -e .`), or start Python outside "
        "prefkern's repository root to import the other package."
    )

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch

from prefkern.backends import tiled
from prefkern.backends.contract import Problem

from .epilogue import KERNELS
from .launches import COUNTS, LAUNCHES

__all__ = ["arithmetic", "fold", "fold_again", "held_back", "seen_kernels", "unfold", "unsupported"]

COMPACTS = FOLDS_WIDE = KEEPS_UNITS = False
arithmetic = KERNELS.arithmetic
fold = functools.partial(tiled.fold, KERNELS)
fold_again = functools.partial(tiled.fold_again, KERNELS)
unfold = functools.partial(tiled.unfold, KERNELS)
HEAD_OPS = ("linear_logps", "linear_divergence", "logits_logps")
# op -> (module, its functions); a module is imported, and triton with it, when it is first called
OPS: dict[str, tuple[str, ...]] = {
    "list_rank": ("list_rank_fwd",),
    "segment_sum": ("segment_sum_fwd", "segment_sum_bwd"),
}
_MODULE = {function: op for op, functions in OPS.items() for function in functions}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OLDEST = (3, 6)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)


def seen_kernels() -> dict[str, int]:
    """Kernel -> launches in this process, under the names of launches.py."""
    return {name: COUNTS[name] for name in LAUNCHES}


def unsupported(problem: Problem) -> list[str]:
    """Reasons why these kernels cannot serve `problem`; empty when they can."""
    reasons = []
    if problem.op not in (*HEAD_OPS, *OPS):
        reasons.append(f"it has no {problem.op} (it has {', '.join((*HEAD_OPS, *OPS))})")
    for dtype in {problem.dtype, problem.weight_dtype} - {None, *DTYPES}:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        reasons.append(f"it computes in {names}, got {dtype}")
    if reason := _no_triton():
        return [*reasons, reason]
    if reason := _no_device(problem.device, problem.index):
        reasons.append(reason)
    return reasons


def held_back(problem: Problem) -> list[str]:
    """Automatic choice never interprets kernels: that is for finding mistakes, not for speed."""
    if problem.device == "cpu":
        return ["Triton's interpreter takes milliseconds per program; name the backend to use it"]
    return []


@functools.cache
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(int(x) for x in version.split(".")[:2]) < OLDEST:
        return f"it needs triton {'.'.join(map(str, OLDEST))} or newer, got {version}"
    return None


def _no_device(device: str, index: int | None) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu":
        if interpreted:
            return None
        return "it runs on cuda tensors (on cpu tensors with TRITON_INTERPRET=1), got cpu"
    if device != "cuda":
        return f"it runs on cuda tensors, got {device}"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, which is for cpu tensors"
    if not torch.cuda.is_available():
        return "torch sees no GPU (no driver, or a build of torch without one)"
    from .tiles import arch_of

    try:
        arch_of(torch.device("cuda", index) if index is not None else torch.device("cuda"))
    except LookupError as error:
        return str(error)
    return None
