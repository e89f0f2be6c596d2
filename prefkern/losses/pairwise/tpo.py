"""Triple preference optimization: likelihood of a gold answer beside a reference-free pair loss."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..record import Supervised


@pairwise(
    source="arXiv 2405.16681",
    status="checked against the authors' code and TRL",
    supervised=Supervised("tpo_alpha", 1.0, rows="gold"),
)
def tpo(
    chosen: SeqStats,
    rejected: SeqStats,
    gold: SeqStats,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> Tensor:  # [P]
    """TPO: logistic loss of the log-probability margin; the gold answer is learned by likelihood.

    l = (1 - eps) softplus(-m) + eps softplus(m),  m = beta (logp(chosen) - logp(rejected)),
    objective: mean l + tpo_alpha * NLL(gold) per token of the batch

    Saeidi et al. 2024 (arXiv 2405.16681).

    Args:
        beta: Scale of the margin, > 0; the authors' example uses 0.2.
    """
    core.positive("beta", beta)
    core.same_items(chosen, gold)
    gap = core.difference(chosen.require("logp"), rejected.require("logp"))
    return links.smoothed_logistic(beta * gap, label_smoothing)


@pairwise(
    source="arXiv 2405.16681",
    status="checked against TRL",
    reads=("logp", "length"),
    score="mean_logp",
    rewards=core.mean_logp_rewards,
    supervised=Supervised("tpo_alpha", 1.0, rows="gold"),
)
def tpo_l(
    chosen: SeqStats,
    rejected: SeqStats,
    gold: SeqStats,
    *,
    beta: float = 0.01,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:  # [P]
    """TPO-L: TPO with log-probabilities per token and a target margin.

    l = (1 - eps) softplus(-m) + eps softplus(m),
    m = beta (mean_logp(chosen) - mean_logp(rejected)) - gamma,
    objective: mean l + tpo_alpha * NLL(gold) per token of the batch

    Saeidi et al. 2024 (arXiv 2405.16681).

    Args:
        gamma: Target margin after beta.
    """
    core.positive("beta", beta)
    core.same_items(chosen, gold)
    gap = core.difference(chosen.mean_logp, rejected.mean_logp)
    return links.smoothed_logistic(beta * gap - gamma, label_smoothing)
