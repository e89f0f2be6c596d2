"""The reference's k largest logits of every row, tile by tile, ties to the lower column.

They are compared by what comes before a soft cap (`LogitOptions.before_cap`): a cap keeps the
order, and these are the bits that every kernel has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .epilogue import LogitOptions

# Logits handled at a time: ranks of ties and the second selection take 12 bytes per logit.
CHUNK = 1 << 22


class TopSet:
    """Running top k: values [m, k] in descending order, equal ones by ascending column."""

    def __init__(self, m: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.full((m, k), -math.inf, dtype=dtype, device=device)
        self.columns = torch.full((m, k), -1, dtype=torch.int64, device=device)

    def add(self, x: Tensor, option: LogitOptions, v0: int) -> None:
        """x [m, w]: products of columns v0 ...; tiles come in ascending order."""
        step = max(1, CHUNK // x.shape[1])
        for i in range(0, x.shape[0], step):
            part = option.before_cap(x[i : i + step], v0, self.values.dtype)
            self._add(part, slice(i, i + part.shape[0]), v0)

    def _add(self, u: Tensor, rows: slice, v0: int) -> None:
        k = self.values.shape[1]
        columns = _first_top(u, min(k, u.shape[1]))
        values = u.gather(1, columns)
        have = min(k, v0)
        # stable: what came first wins a tie, and it has the lower column
        values = torch.cat([self.values[rows, :have], values], 1)
        columns = torch.cat([self.columns[rows, :have], columns + v0], 1)
        values, order = torch.sort(values, dim=1, descending=True, stable=True)
        kept = min(k, values.shape[1])
        self.values[rows, :kept] = values[:, :kept]
        self.columns[rows, :kept] = columns.gather(1, order)[:, :kept]

    @property
    def members(self) -> Tensor:
        """[2, k, m] float64: values and columns; the last are the threshold."""
        return torch.stack([self.values.double(), self.columns.double()]).transpose(1, 2)


def _first_top(x: Tensor, k: int) -> Tensor:
    """Columns [m, k], ascending, of the k largest entries; of equal ones at the edge the first."""
    edge = torch.topk(x, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, tied = x > edge, x == edge
    room = k - above.sum(1, keepdim=True, dtype=torch.int32)
    member = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))
    # exactly k entries of each row are members, so their order within topk does not matter
    chosen = torch.topk(member.to(x.dtype), k, dim=1, sorted=False).indices
    return chosen.sort(1).values
