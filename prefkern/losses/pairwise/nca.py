"""Noise contrastive alignment of a pair."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2402.05369", status="checked against the authors' code and TRL", reference=True
)
def nca_pair(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.01) -> Tensor:  # [P]
    """NCA for pairs: classifies each answer against the reference, the chosen one both ways.

    l = softplus(-u) + softplus(u) / 2 + softplus(v) / 2,
    u = beta logratio(chosen),  v = beta logratio(rejected)

    Chen et al. 2024 (arXiv 2402.05369).
    """
    core.positive("beta", beta)
    core.same_items(chosen, rejected)
    good = links.logistic(beta * chosen.logratio, 1.0, 0.5)
    return good + 0.5 * links.logistic(-beta * rejected.logratio)
