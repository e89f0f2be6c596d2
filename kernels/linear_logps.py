"""linear_logps: library products of tiles, a one-read fold, a one-read one-write gradient; or one
fused kernel, where tiles.scheme says so."""

from __future__ import annotations

import functools

from torch import Tensor

from prefkern.backends.tiled import forward, ops
from prefkern.backends.tiled.epilogue import LogitOptions
from prefkern.backends.tiled.heads import Head

from . import fused
from .epilogue import KERNELS


def linear_logps_fwd(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    cache_rows: int,
    frozen: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved [1, N], cache [cache_rows, V], rows [n', N, D] or [0])."""
    heads = [Head(hidden, weight, LogitOptions(scale, softcap, temperature, bias))]
    given = (heads, targets, ignore_index, num_scored, stats, cache_rows, frozen)
    if fused.wanted("linear_logps", heads, stats, cache_rows, frozen):
        return fused.forward(*given)
    return forward.forward(KERNELS, *given)


linear_logps_bwd = functools.partial(ops.linear_logps_bwd, KERNELS)
