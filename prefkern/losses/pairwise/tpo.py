"""Triple preference optimization: likelihood of a gold answer beside a reference-free pair loss."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss, Supervised


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
        chosen, rejected: Statistics of the two answers, each field `[P]`.
        gold: Statistics of the best answer `[P]`; only the likelihood term scores it.
        beta: Scale of the margin, > 0, default 0.01; the authors' example uses 0.2.
        label_smoothing: Probability eps in [0, 0.5] that a label is wrong, default 0.

    Returns:
        Unreduced loss `[P]`, without the likelihood term (weight `tpo_alpha`, default 1).

    Raises:
        ValueError: beta <= 0, label_smoothing outside [0, 0.5], shapes that differ.
    """
    core.positive("beta", beta)
    core.same_items(chosen, gold)
    gap = core.difference(chosen.require("logp"), rejected.require("logp"))
    return links.smoothed_logistic(beta * gap, label_smoothing)


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `length`.
        gold: Statistics of the best answer `[P]`; only the likelihood term scores it.
        beta: Scale of the margin, > 0, default 0.01.
        gamma: Target margin after beta, default 0.5.
        label_smoothing: Probability eps in [0, 0.5] that a label is wrong, default 0.

    Returns:
        Unreduced loss `[P]`, without the likelihood term (weight `tpo_alpha`, default 1).

    Raises:
        ValueError: beta <= 0, label_smoothing outside [0, 0.5], shapes that differ.
    """
    core.positive("beta", beta)
    core.same_items(chosen, gold)
    gap = core.difference(chosen.mean_logp, rejected.mean_logp)
    return links.smoothed_logistic(beta * gap - gamma, label_smoothing)


TPO, TPO_L = (
    Loss(
        fn,
        fn.__name__,
        "pairwise",
        status=status,
        source="arXiv 2405.16681",
        rows=("chosen", "rejected", "gold"),
        rewards=rewards,
        supervised=Supervised("tpo_alpha", 1.0, rows="gold"),
        logps=logps,
    )
    for fn, status, rewards, logps in (
        (tpo, "checked against the authors' code and TRL", core.logp_rewards, "logp"),
        (tpo_l, "checked against TRL", core.mean_logp_rewards, "mean_logp"),
    )
)
