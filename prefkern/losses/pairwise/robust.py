"""Provably robust DPO: an unbiased loss under labels flipped with a known rate."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(source="arXiv 2403.00409", status="checked against TRL", reference=True)
def robust(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:  # [P]
    """Robust DPO: the logistic loss corrected for labels that are wrong with probability eps.

    l = [(1 - eps) softplus(-m) - eps softplus(m)] / (1 - 2 eps),
    m = beta (logratio(chosen) - logratio(rejected))

    Unbounded below: l falls like -eps m / (1 - 2 eps), so negative losses are normal.

    Chowdhury et al. 2024 (arXiv 2403.00409).

    Args:
        label_smoothing: Flip rate eps in [0, 0.5).
    """
    core.positive("beta", beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            "label_smoothing must be in [0, 0.5) (at 0.5 the loss divides by 0), got "
            f"{label_smoothing}."
        )
    scale = 1.0 - 2.0 * label_smoothing
    margin = beta * core.logratio_gap(chosen, rejected)
    return links.logistic(margin, (1.0 - label_smoothing) / scale, -label_smoothing / scale)
