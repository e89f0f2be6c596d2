"""DPO-Shift: DPO with the rejected answer's reward scaled down."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2502.07599",
    status="second-hand description; schedules of the factor are the caller's",
    reference=True,
)
def dpo_shift(
    chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1, shift: float = 0.95
) -> Tensor:  # [P]
    """DPO-Shift: logistic loss of the chosen reward less a share of the rejected one.

    l = softplus(-beta (logratio(chosen) - shift logratio(rejected)))

    A share below 1 keeps the chosen answer's probability up and narrows the margin. The paper holds
    it fixed (0.5 to 0.95) or moves it linearly over the run.

    Yang et al. 2025 (arXiv 2502.07599).

    Args:
        shift: Factor f in (0, 1] of the rejected log-ratio; 1 is DPO.
    """
    core.positive("beta", beta)
    if not 0.0 < shift <= 1.0:
        raise ValueError(f"shift must be in (0, 1], got {shift}; 1 is DPO.")
    return links.logistic(beta * core.difference(chosen.logratio, shift * rejected.logratio))
