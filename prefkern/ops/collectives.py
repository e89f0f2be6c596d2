"""Collectives by the name (a str) of their process group, as ops that a compiler may trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def all_gather(x: Tensor, group: Any) -> Tensor:
    """x of every rank [R, ...]; all ranks bring the same shape."""
    world = torch.distributed.distributed_c10d._resolve_process_group(group).size()
    ops = torch.ops._c10d_functional
    flat = x.contiguous().reshape(1, *x.shape)
    return ops.wait_tensor(ops.all_gather_into_tensor(flat, world, group))


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over ranks."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group))


def reduce_scatter(x: Tensor, group: Any) -> Tensor:
    """x [R, ...] of every rank: of the sum over ranks, the part of this one [...]."""
    ops = torch.ops._c10d_functional
    flat = x.contiguous().flatten(0, 1)
    return ops.wait_tensor(ops.reduce_scatter_tensor(flat, "sum", x.shape[0], group))
