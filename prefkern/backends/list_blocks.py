"""Ragged groups cut into padded blocks, for the eager twin of list_rank and for ranking losses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def blocks(
    cu_groups: Tensor,  # [G+1]
    cells: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # [g], [g, K], [g, K] bool
    """(groups, items, inside) of blocks whose tables [g, K, K] have at most `cells` cells.

    Groups are taken by size, so padding is short; a single group may have more cells. Entries
    outside a group repeat its first item. Reads the sizes: one synchronisation on a GPU.
    """
    start = cu_groups[:-1].long()
    size, order = torch.sort(cu_groups[1:].long() - start, stable=True)
    sizes = size.cpu().numpy()
    first = int(np.searchsorted(sizes, 1))
    while first < len(sizes):
        rest = sizes[first:]
        fits = int(np.searchsorted(np.arange(1, len(rest) + 1) * rest**2, cells, side="right"))
        last = first + max(fits, 1)
        column = torch.arange(int(sizes[last - 1]), device=cu_groups.device)  # [K]
        inside = column < size[first:last, None]
        groups = order[first:last]
        yield groups, start[groups][:, None] + torch.where(inside, column, 0), inside
        first = last
