"""Blocks of padded groups and the pieces that ranking families share.

Shapes: S items, g groups of one block padded to K items; everything is [g, K] or [g, K, K]. Rows
and columns: i is the row, j the column; a "pair" (i, j) has label y_i > y_j.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..list_options import ListOptions

BLOCK_ELEMENTS = 1 << 21  # 16 MiB in fp64


class Block(NamedTuple):
    """Groups of one block; padding and masked items have score and label 0 and valid False."""

    score: Tensor  # [g, K]
    label: Tensor  # [g, K]
    valid: Tensor  # [g, K] bool
    topk: Tensor  # [g] stages wanted, at most the number of valid items


def blocks(cu_groups: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Non-empty groups in blocks of similar size: sizes of one block lie between K/2 and K."""
    start = cu_groups[:-1].long()
    size = cu_groups[1:].long() - start
    size, order = torch.sort(size, stable=True)
    sizes = size.tolist()
    first, total = sum(s == 0 for s in sizes), len(sizes)
    while first < total:
        limit = (
            2 * sizes[first] - 1
        )  # sizes are ascending, so every padded row is at least half full
        last = first
        while last < total and sizes[last] <= limit:
            last += 1
            if last < total and (last + 1 - first) * sizes[last] ** 2 > BLOCK_ELEMENTS:
                break
        groups = order[first:last]  # [g]
        column = torch.arange(sizes[last - 1], device=cu_groups.device)  # [K]
        inside = column < size[first:last, None]
        items = start[groups][:, None] + torch.where(inside, column, 0)
        yield groups, items, inside
        first = last


def rank(value: Tensor, valid: Tensor) -> Tensor:  # [g, K] int64
    """1-based rank in descending order, equal values by position, counted without a sort."""
    position = torch.arange(value.shape[1], device=value.device)
    ahead = value[:, None, :] > value[:, :, None]
    ahead |= (value[:, None, :] == value[:, :, None]) & (position[None, :] < position[:, None])
    return 1 + (ahead & valid[:, None, :]).sum(2)


def discount(rank: Tensor, dtype: torch.dtype, opts: ListOptions) -> Tensor:
    """1 / log_b(1 + rank), 0 beyond topn."""
    value = 1.0 / torch.log1p(rank.to(dtype))
    if opts.log_base == "2":
        value = value * math.log(2.0)
    return torch.where(rank > opts.topn, 0.0, value) if opts.topn else value


def gain(label: Tensor, kind: str) -> Tensor:
    return torch.expm1(label * math.log(2.0)) if kind == "exp2" else label


def pairs(b: Block) -> tuple[Tensor, Tensor]:  # [g, K, K] bool, [g, K, K]
    """Which (i, j) have y_i > y_j, and s_i - s_j."""
    strict = b.label[:, :, None] > b.label[:, None, :]
    strict &= b.valid[:, :, None] & b.valid[:, None, :]
    return strict, b.score[:, :, None] - b.score[:, None, :]


def fold_pairs(b: Block, strict: Tensor, value: Tensor, slope: Tensor, opts: ListOptions):
    """Sums a value per pair into [g], and a slope dl/d(s_i - s_j) <= 0 per pair into u [g, K]."""
    loss = value.sum((1, 2))
    u = slope.sum(2) - slope.sum(1)
    factor = torch.ones_like(loss)
    if opts.pair_reduction == "mean":
        factor = factor / strict.sum((1, 2)).clamp(min=1)
    if opts.scale_by_list_size:
        factor = factor * b.valid.sum(1)
    return loss * factor, u * factor[:, None]


def compete(value: Tensor, member: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """LSE of the members of each last axis less `own`, and the softmax of the members.

    The greatest member is taken off first: LSE - own of two numbers near 500 would keep no digit of
    a small difference in fp32. An axis without members gives 0 and 0.
    """
    top = torch.where(member, value, -torch.inf).amax(-1)
    top = torch.where(member.any(-1), top, own)
    weight = torch.where(member, torch.exp(value - top[..., None]), 0.0)
    total = weight.sum(-1)
    total = torch.where(total > 0, total, 1.0)
    return torch.log(total) + (top - own), weight / total[..., None]
