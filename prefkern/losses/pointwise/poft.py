"""PoFT: supervised data weighted by how other aligned models rate it."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pointwise


@pointwise(
    source="arXiv 2412.12865 eq. 5-8",
    status="paper and code read",
    reads=("logp", "length"),
    rewards=core.mean_logp_rewards,
)
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
        baseline_mean_logps: `[S]` b, computed once and cached. Constant.
        beta: Scale, > 0.
        gamma: Shift.
    """
    core.positive("beta", beta)
    mean = seq.mean_logp
    gap = mean - core.data("baseline_mean_logps", baseline_mean_logps, mean)
    return links.logistic(beta * gap + gamma)
