"""Eager PyTorch twin of every op: the definition of correct, written for reading.

Serves any device and dtype and holds full [N, V] logits, so it is also the baseline of tests and
benchmarks. Function signatures here are the signatures every backend module follows.
"""

from __future__ import annotations

from ..contract import Problem
from .error_sum import error_sum_bwd, error_sum_fwd
from .linear_divergence import linear_divergence_bwd, linear_divergence_fwd
from .linear_logps import linear_logps_bwd, linear_logps_fwd
from .list_rank import list_rank_fwd
from .logits_logps import logits_logps_bwd, logits_logps_fwd
from .segment_sum import segment_sum_bwd, segment_sum_fwd

__all__ = [
    "error_sum_bwd",
    "error_sum_fwd",
    "linear_divergence_bwd",
    "linear_divergence_fwd",
    "linear_logps_bwd",
    "linear_logps_fwd",
    "list_rank_fwd",
    "logits_logps_bwd",
    "logits_logps_fwd",
    "segment_sum_bwd",
    "segment_sum_fwd",
    "unsupported",
]


def unsupported(problem: Problem) -> list[str]:
    """The reference serves everything."""
    return []
