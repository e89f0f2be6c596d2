"""Simple preference optimization: mean log-probabilities, no reference, a target margin."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..record import Supervised


@pairwise(
    source="arXiv 2405.14734",
    status="checked against the authors' code, TRL and HALOs",
    reads=("logp", "length"),
    score="mean_logp",
    rewards=core.mean_logp_rewards,
    supervised=Supervised("sft_weight", 0.0),
)
def simpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
    label_smoothing: float = 0.0,
    link: str = "sigmoid",
) -> Tensor:  # [P]
    """SimPO: logistic loss of the length-normalised log-probability margin beyond a target.

    l = (1 - eps) softplus(-m) + eps softplus(m),
    m = beta (mean_logp(chosen) - mean_logp(rejected) - gamma_beta_ratio)

    Meng et al. 2024 (arXiv 2405.14734). An empty answer has mean_logp 0.

    Args:
        beta: Scale of the margin, > 0; released recipes use 2 to 10.
        gamma_beta_ratio: Target margin in nats per token; recipes use 0.1 to 0.8.
    """
    core.positive("beta", beta)
    core.choice("link", link, ("sigmoid", "hinge"))
    margin = beta * (core.difference(chosen.mean_logp, rejected.mean_logp) - gamma_beta_ratio)
    if link == "hinge":
        return links.hinge_loss(margin)
    return links.smoothed_logistic(margin, label_smoothing)
