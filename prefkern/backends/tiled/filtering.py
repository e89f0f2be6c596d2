"""Optional gradient filtering: columns of the vocabulary whose every |dL/dx| in a tile is below the
rounding of the working dtype are left out of the backward products.

Off by default. Most of a real vocabulary has a probability below 2^-9 in every row of a tile, so
with 16-bit dtypes the two products of the backward shrink to the columns that matter.

Bound. Let s_i be the size of row i's gradient: the sum of the moduli of what multiplies its terms
(for logp with upstream number c, 2 |c scale / temperature|). A column is left out where
|dx_iv| < eps / 2 * s_i in every row i of the tile, eps being that of the working dtype. So each
entry of dH_i is off by at most eps / 2 * s_i * sum_v |W_vd|, and each entry of dW_v by at most
eps / 2 * sum_i s_i |h_id|, the sums over what was left out. d_bias is exact.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .epilogue import COEFFICIENTS

# What multiplies a term of at most order 1; the rest of COEFFICIENTS are values and normalisers.
_SIZES = tuple(
    COEFFICIENTS.index(name)
    for name in (
        "e", "a0", "ent", "col", "fkl", "rkl", "ev", "alpha", "renyi", "mix", "jsd", "tv", "bkl",
    )
)  # fmt: skip


@dataclass
class FilterReport:
    """What filtering did while it was on."""

    columns: int = 0  # columns of all tiles whose products were asked for
    skipped: int = 0  # of these, the ones left out

    @property
    def share(self) -> float:
        """Share of the columns left out, 0 where there was nothing to filter."""
        return self.skipped / self.columns if self.columns else 0.0


# Process-wide: a backward runs in a thread of autograd's own, where no context variable arrives.
_lock = threading.Lock()
_reports: list[FilterReport] = []


@contextmanager
def filter_gradient() -> Iterator[FilterReport]:
    """Filters the gradient of every 16-bit head op whose backward runs within the block, in any
    thread; yields the report. fp32 and fp64 are never filtered.

    Which columns to leave out is known on the device only, so each tile costs one synchronisation,
    and a backward cannot be captured into a CUDA graph. The error is bounded as the module says.
    """
    report = FilterReport()
    with _lock:
        _reports.append(report)
    try:
        yield report
    finally:
        with _lock:
            _reports.remove(report)


def on(working: torch.dtype) -> bool:
    """True where a backward of this working dtype is to filter."""
    return bool(_reports) and working in (torch.bfloat16, torch.float16)


def limits(coefficients: Tensor, working: torch.dtype) -> Tensor:
    """eps / 2 * s [M] in the working dtype."""
    # row by row: a list of indices would be copied from the host, which waits for the device
    size = torch.stack([coefficients[i].abs() for i in _SIZES]).sum(0)
    return (size * (torch.finfo(working).eps / 2)).to(working)


def active_columns(dx: Tensor, limit: Tensor) -> Tensor | None:
    """Indices of the columns of dx [m, w] to keep; None where that is all of them.

    Raises:
        RuntimeError: under graph capture, where the host cannot know the count.
    """
    if dx.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "filter_gradient() has to know on the host which columns are left, and a CUDA graph is "
            "being captured; leave the block before capturing, or capture without filtering."
        )
    # not (small), so that a NaN keeps its column
    keep = ~(dx.abs() < limit[:, None]).all(0)
    index = keep.nonzero().flatten()
    with _lock:
        for report in _reports:
            report.columns += dx.shape[1]
            report.skipped += dx.shape[1] - index.shape[0]
    return None if index.shape[0] == dx.shape[1] else index
