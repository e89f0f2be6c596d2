"""Which rows of a call are computed. Shapes: N tokens, M scored ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.contract import HeadCall


def scored_rows(targets: Tensor, ignore_index: int, num_scored: int | None) -> Tensor | None:
    """Index [M] of the rows that are not ignored; None where their number cannot be known here
    (tracing, graph capture), so that the op computes all rows and masks.

    Their number is `num_scored`; None counts them, which on a GPU is the one synchronisation of a
    call.
    """
    keep = targets != ignore_index
    if num_scored is not None:
        return torch.nonzero_static(keep, size=num_scored, fill_value=0).flatten()
    if torch.compiler.is_compiling():
        return None
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return keep.nonzero().flatten()


def poison(out: Tensor, call: HeadCall) -> Tensor:
    """out [n, N], all NaN where the stated number of rows is not the number of labels: a device
    that is not read cannot refuse it, and rows would be missing or counted twice."""
    count = (call.targets != call.ignore_index).sum()
    return torch.where(count == call.M, out, torch.nan)
