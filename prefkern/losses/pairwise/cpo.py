"""Contrastive preference optimization: DPO's link on log-probabilities, plus likelihood."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss, Supervised


def cpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:  # [P]
    """CPO: logistic loss of the summed log-probability margin.

    l = (1 - eps) softplus(-m) + eps softplus(m),  m = beta (logp(chosen) - logp(rejected)),
    objective: mean l + cpo_alpha * NLL(chosen) per token of the batch

    Xu et al. 2024 (arXiv 2401.08417), eq. 3.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`.
        beta: Scale of the margin, > 0, default 0.1.
        label_smoothing: Probability eps in [0, 0.5] that a label is wrong, default 0.

    Returns:
        Unreduced loss `[P]`, without the likelihood term (weight `cpo_alpha`, default 1).

    Raises:
        ValueError: beta <= 0, label_smoothing outside [0, 0.5], shapes that differ.
    """
    core.positive("beta", beta)
    gap = core.difference(chosen.require("logp"), rejected.require("logp"))
    return links.smoothed_logistic(beta * gap, label_smoothing)


CPO = Loss(
    cpo,
    "cpo",
    "pairwise",
    status="checked against TRL",
    source="arXiv 2401.08417 eq. 3",
    rewards=core.logp_rewards,
    supervised=Supervised("cpo_alpha", 1.0),
)
