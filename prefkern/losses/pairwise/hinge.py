"""Hinge-norm loss of RSO (SLiC on log-ratios)."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(source="arXiv 2309.06657", status="checked against TRL", reference=True)
def hinge(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.05) -> Tensor:  # [P]
    """RSO hinge-norm: how much the log-ratio margin falls short of 1.

    l = max(0, 1 - m),  m = beta (logratio(chosen) - logratio(rejected))

    Liu et al. 2023 (arXiv 2309.06657). The derivative at the kink m = 1 is 0.

    Args:
        beta: Inverse of the margin in nats, > 0.
    """
    core.positive("beta", beta)
    return links.hinge_loss(beta * core.logratio_gap(chosen, rejected))
