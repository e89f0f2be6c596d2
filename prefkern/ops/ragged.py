"""Positions on a packed axis: which segment owns them, what rank they have in it, which is best.

A segment is a sequence of tokens or a list of answers; the boundaries `cu` [S+1] are `cu_seqlens`
or `cu_groups`. Shapes: N positions, S segments.
"""

from __future__ import annotations

import torch
from torch import Tensor


def owner(cu: Tensor, n: int) -> Tensor:  # [N] int64
    """The segment each of n packed positions belongs to."""
    position = torch.arange(n, device=cu.device, dtype=cu.dtype)
    return torch.searchsorted(cu[1:].contiguous(), position, right=True)


def spread(per_segment: Tensor, cu: Tensor, n: int) -> Tensor:  # [N]
    """per_segment [S] repeated over the positions of each segment."""
    return per_segment[owner(cu, n)]


def rank(
    key: Tensor,  # [N]
    kept: Tensor,  # [N] bool
    cu: Tensor,  # [S+1]
    *,
    descending: bool = False,
) -> Tensor:  # [N] int64
    """0-based place of each position in its segment, ordered by key; earlier positions win ties and
    those not `kept` come last."""
    segment = owner(cu, key.numel())
    order = torch.argsort(torch.where(kept, key, 0.0), descending=descending, stable=True)
    order = order[torch.argsort((~kept)[order].long(), stable=True)]
    order = order[torch.argsort(segment[order], stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return place - cu.long()[segment]


def first_best(values: Tensor, cu: Tensor) -> Tensor:  # [N] bool
    """True at the first position of highest value of each segment; NaN is no value."""
    if not values.is_floating_point():
        values = values.double()
    segment, n, size = owner(cu, values.numel()), values.numel(), cu.numel() - 1
    there = ~values.isnan()
    high = values.new_full((size,), -torch.inf).scatter_reduce(
        0, segment, torch.where(there, values, -torch.inf), "amax"
    )
    top = there & (values == high[segment])
    position = torch.arange(n, device=values.device)
    first = position.new_full((size,), n).scatter_reduce(
        0, segment, torch.where(top, position, n), "amin"
    )
    return position == first[segment]


def distinct(key: Tensor) -> Tensor:  # [N] int64 -> [N] int64
    """The rank of each position's key among the distinct ones."""
    key, order = torch.sort(key)
    new = torch.ones_like(key)
    new[1:] = (key[1:] != key[:-1]).long()
    number = torch.empty_like(order)
    number[order] = new.cumsum(0) - 1
    return number
