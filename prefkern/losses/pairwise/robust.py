"""Provably robust DPO: an unbiased loss under labels flipped with a known rate."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        beta: Strength of the pull to the reference, > 0, default 0.1.
        label_smoothing: Flip rate eps in [0, 0.5), default 0.1.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, label_smoothing outside [0, 0.5), shapes that differ.
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


ROBUST = Loss(
    robust,
    "robust",
    "pairwise",
    needs_reference=True,
    status="checked against TRL",
    source="arXiv 2403.00409",
    rewards=core.logratio_rewards,
)
