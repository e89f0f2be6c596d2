"""Noise contrastive alignment of a pair."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


def nca_pair(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.01) -> Tensor:  # [P]
    """NCA for pairs: classifies each answer against the reference, the chosen one both ways.

    l = softplus(-u) + softplus(u) / 2 + softplus(v) / 2,
    u = beta logratio(chosen),  v = beta logratio(rejected)

    Chen et al. 2024 (arXiv 2402.05369).

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        beta: Strength of the pull to the reference, > 0, default 0.01.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    core.positive("beta", beta)
    core.same_items(chosen, rejected)
    good = links.logistic(beta * chosen.logratio, 1.0, 0.5)
    return good + 0.5 * links.logistic(-beta * rejected.logratio)


NCA_PAIR = Loss(
    nca_pair,
    "nca_pair",
    "pairwise",
    needs_reference=True,
    status="checked against the authors' code and TRL",
    source="arXiv 2402.05369",
    rewards=core.logratio_rewards,
)
