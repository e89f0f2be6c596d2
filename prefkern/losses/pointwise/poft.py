"""PoFT: supervised data weighted by how other aligned models rate it."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


def poft(
    seq: SeqStats,
    *,
    baseline_mean_logps: Tensor,  # [S]
    beta: float = 1.0,
    gamma: float = 0.0,
) -> Tensor:  # [S]
    """PoFT: prefers the policy's mean log-probability of an answer over other models' mean.

    l = softplus(-(beta (mean_logp - b) + gamma)),
    b = mean over models of their mean log-probability

    arXiv 2412.12865, eq. 5-8. Needs no preference labels. The paper scores response tokens only;
    the released trainer also scores the prompt.

    Args:
        seq: Statistics of the answers, each field `[S]`; needs `length`.
        baseline_mean_logps: `[S]` b, computed once and cached. Constant.
        beta: Scale, > 0, default 1.
        gamma: Shift, default 0.

    Returns:
        Unreduced loss `[S]`.

    Raises:
        ValueError: beta <= 0, baseline_mean_logps is not `[S]`.
    """
    core.positive("beta", beta)
    mean = seq.mean_logp
    gap = mean - core.data("baseline_mean_logps", baseline_mean_logps, mean)
    return links.logistic(beta * gap + gamma)


POFT = Loss(
    poft,
    "poft",
    "pointwise",
    extra=("baseline_mean_logps",),
    status="paper and code read",
    source="arXiv 2412.12865 eq. 5-8",
    rewards=core.mean_logp_rewards,
)
