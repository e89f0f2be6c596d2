"""Simple preference optimization: mean log-probabilities, no reference, a target margin."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss, Supervised


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `length`.
        beta: Scale of the margin, > 0, default 2.0; released recipes use 2 to 10.
        gamma_beta_ratio: Target margin in nats per token, default 0.25; recipes use 0.1 to 0.8.
        label_smoothing: Probability eps in [0, 0.5] that a label is wrong, default 0.
        link: "sigmoid" or "hinge" (max(0, 1 - m)), default "sigmoid".

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, label_smoothing outside [0, 0.5], an unknown link, shapes that
            differ.
    """
    core.positive("beta", beta)
    core.choice("link", link, ("sigmoid", "hinge"))
    margin = beta * (core.difference(chosen.mean_logp, rejected.mean_logp) - gamma_beta_ratio)
    if link == "hinge":
        return links.hinge(margin)
    return links.smoothed_logistic(margin, label_smoothing)


SIMPO = Loss(
    simpo,
    "simpo",
    "pairwise",
    status="checked against the authors' code, TRL and HALOs",
    source="arXiv 2405.14734",
    rewards=core.mean_logp_rewards,
    supervised=Supervised("sft_weight", 0.0),
    logps="mean_logp",
)
