"""Eager PyTorch for every op: any device, any dtype, written for reading; holds full [M, V] logits,
so it is also the baseline of tests and benchmarks."""

from __future__ import annotations

from ..contract import Problem
from . import finish as arithmetic
from .error_sum import error_sum_bwd, error_sum_fwd
from .head import COMPACTS, FOLDS_WIDE, fold, fold_again, unfold
from .list_rank import list_rank_fwd
from .segment_sum import segment_sum_bwd, segment_sum_fwd

__all__ = [
    "COMPACTS",
    "FOLDS_WIDE",
    "arithmetic",
    "error_sum_bwd",
    "error_sum_fwd",
    "fold",
    "fold_again",
    "list_rank_fwd",
    "segment_sum_bwd",
    "segment_sum_fwd",
    "unfold",
    "unsupported",
]


def unsupported(problem: Problem) -> list[str]:
    """Eager PyTorch serves everything."""
    return []
