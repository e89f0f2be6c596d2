"""linear_divergence: tiles of policy and reference (and a third head) folded together; or one fused
kernel, where tiles.scheme says so."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from prefkern.backends.tiled import ops

from . import fused
from .epilogue import KERNELS


def linear_divergence_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in prefkern.backends.eager."""
    hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias, aux_hidden, aux_weight = args[
        :9
    ]
    options, (ignore_index, stats, cache_rows, frozen, num_scored) = args[11:17], args[17:]
    heads = ops.make_heads(
        hidden, weight, ref_hidden, ref_weight, bias, ref_bias, aux_hidden, aux_weight, *options
    )
    if fused.wanted("linear_divergence", heads, stats, cache_rows, frozen):
        return fused.forward(heads, targets, ignore_index, num_scored, stats, cache_rows, frozen)
    return ops.linear_divergence_fwd(KERNELS, *args)


linear_divergence_bwd = functools.partial(ops.linear_divergence_bwd, KERNELS)
