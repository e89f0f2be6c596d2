"""Hinge-norm loss of RSO (SLiC on log-ratios)."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


def hinge(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.05) -> Tensor:  # [P]
    """RSO hinge-norm: how much the log-ratio margin falls short of 1.

    l = max(0, 1 - m),  m = beta (logratio(chosen) - logratio(rejected))

    Liu et al. 2023 (arXiv 2309.06657). The derivative at the kink m = 1 is 0.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        beta: Inverse of the margin in nats, > 0, default 0.05.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    core.positive("beta", beta)
    return links.hinge(beta * core.logratio_gap(chosen, rejected))


HINGE = Loss(
    hinge,
    "hinge",
    "pairwise",
    needs_reference=True,
    status="checked against TRL",
    source="arXiv 2309.06657",
    rewards=core.logratio_rewards,
)
