"""The reference's k largest logits of every row, tile by tile, ties to the lower index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Logits handled at a time: ranks of ties and the second selection take 12 bytes per logit.
CHUNK = 1 << 22


class TopSet:
    """Running top k: values [M, k] in descending order, equal ones by ascending column."""

    def __init__(self, m: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.full((m, k), -math.inf, dtype=dtype, device=device)
        self.columns = torch.full((m, k), -1, dtype=torch.int64, device=device)
        self.filled = 0  # columns of all tiles so far, up to k

    def add(self, seen: Tensor, rows: slice, v0: int) -> None:
        """seen [m, w]: logits of columns v0 ... of these rows; tiles come in ascending order."""
        step = max(1, CHUNK // seen.shape[1])
        for i in range(0, seen.shape[0], step):
            part = seen[i : i + step]
            self._add(part, slice(rows.start + i, rows.start + i + part.shape[0]), v0)

    def _add(self, seen: Tensor, rows: slice, v0: int) -> None:
        k = self.values.shape[1]
        found = min(k, seen.shape[1])
        columns = _first_top(seen, found)
        values = seen.gather(1, columns)
        have = min(k, v0)
        # stable: what came first wins a tie, and it has the lower column
        values = torch.cat([self.values[rows, :have], values], 1)
        columns = torch.cat([self.columns[rows, :have], columns + v0], 1)
        values, order = torch.sort(values, dim=1, descending=True, stable=True)
        kept = min(k, values.shape[1])
        self.values[rows, :kept] = values[:, :kept]
        self.columns[rows, :kept] = columns.gather(1, order)[:, :kept]

    @property
    def threshold(self) -> tuple[Tensor, Tensor]:
        """(value [M], column [M]) of the last member."""
        return self.values[:, -1], self.columns[:, -1]


def _first_top(x: Tensor, k: int) -> Tensor:
    """Columns [m, k], ascending, of the k largest entries; of equal ones at the edge the first."""
    edge = torch.topk(x, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, tied = x > edge, x == edge
    room = k - above.sum(1, keepdim=True, dtype=torch.int32)
    member = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))
    # exactly k entries of each row are members, so their order within topk does not matter
    chosen = torch.topk(member.to(x.dtype), k, dim=1, sorted=False).indices
    return chosen.sort(1).values
