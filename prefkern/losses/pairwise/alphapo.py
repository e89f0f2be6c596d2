"""AlphaPO: SimPO with an alpha-shaped reward."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2501.03884",
    status="checked against TRL",
    reads=("logp", "length"),
    score="mean_logp",
    rewards=core.mean_logp_rewards,
)
def alphapo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 2.5,
    gamma: float = 0.1,
    alpha: float = 0.25,
) -> Tensor:  # [P]
    """AlphaPO: logistic loss of the margin of shaped mean log-probabilities.

    l = softplus(-m),  m = beta (phi(mean_logp(chosen)) - phi(mean_logp(rejected))) - gamma,
    phi(x) = (1 - exp(-alpha x)) / alpha, x for alpha = 0

    Gupta et al. 2025 (arXiv 2501.03884).

    Args:
        gamma: Target margin after beta.
        alpha: Shape of the reward.
    """
    core.positive("beta", beta)
    score = core.difference(
        links.alpha_score(chosen.mean_logp, alpha),
        links.alpha_score(rejected.mean_logp, alpha),
    )
    return links.logistic(beta * score - gamma)
