"""AlphaPO: SimPO with an alpha-shaped reward."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `length`.
        beta: Scale of the margin, > 0, default 2.5.
        gamma: Target margin after beta, default 0.1.
        alpha: Shape of the reward, default 0.25.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    core.positive("beta", beta)
    score = core.difference(
        links.alpha_score(chosen.mean_logp, alpha),
        links.alpha_score(rejected.mean_logp, alpha),
    )
    return links.logistic(beta * score - gamma)


ALPHAPO = Loss(
    alphapo,
    "alphapo",
    "pairwise",
    status="checked against TRL",
    source="arXiv 2501.03884",
    rewards=core.mean_logp_rewards,
    logps="mean_logp",
)
