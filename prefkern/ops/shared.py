"""What the ops share: flattening, dtypes, backend choice, turning columns into TokenStats."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import traced
from ..backends import choice
from ..backends.contract import Problem
from ..stats import NO_GRADIENT, Stat, TokenStats


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The autocast dtype if autocast is on for this device, else hidden's (fp64 stays fp64)."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def rows_of(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden [N, D] or [B, T, D] -> contiguous [N, D] in the compute dtype."""
    return hidden.reshape(-1, hidden.shape[-1]).to(dtype).contiguous()


def run(backend: str, function: str, *args):
    """Calls a backend's function. Dtypes are settled by then: autocast must not reach in."""
    with no_autocast(args[0].device.type):
        return getattr(choice.load_backend(backend), function)(*args)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast is off in the block."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@traced.constant_result
def choose_backend(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    stats: str,
    backend: str,
    shape: tuple[int, int, int] | None,
) -> str:
    """Backend name for one call; evaluated once per trace under torch.compile."""
    n, v, d = shape or (None, None, None)
    problem = Problem(
        op=op, device=device.type, dtype=dtype, weight_dtype=weight_dtype,
        stats=tuple(stats.split(",")) if stats else (), N=n, V=v, D=d, index=device.index,
    )  # fmt: skip
    return choice.select_backend(problem, backend)


def shape_for_message(n: int, v: int, d: int) -> tuple[int, int, int] | None:
    """Sizes quoted in a refusal; left out while tracing, where they may be symbolic."""
    return None if torch.compiler.is_compiling() else (n, v, d)


@traced.constant_result
def compacts(backend: str) -> bool:
    """Whether a backend leaves ignored rows out by itself."""
    return choice.load_backend(backend).COMPACTS


@traced.constant_result
def keeps_units(backend: str) -> bool:
    """Whether a backward with a tail reads what a backend's forward kept."""
    return getattr(choice.load_backend(backend), "KEEPS_UNITS", True)


@traced.constant_result
def picks_scheme(backend: str) -> bool:
    """Whether a call with a tail and a frozen head may take either scheme."""
    return getattr(choice.load_backend(backend), "PICKS_SCHEME", False)


def to_token_stats(
    out: Tensor, stats: tuple[Stat, ...], quiet: frozenset[str], shape: torch.Size
) -> TokenStats:
    """out [n, N] -> one field per statistic in the shape of targets; constants are detached."""
    fields = {}
    for stat, column in zip(stats, out.unbind(0), strict=True):
        constant = stat.name in NO_GRADIENT or stat.name in quiet
        column = column.detach() if constant else column
        fields[stat.name] = column.reshape(shape)
    return TokenStats(**fields)
