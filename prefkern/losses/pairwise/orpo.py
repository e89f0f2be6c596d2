"""Odds-ratio preference optimization: likelihood plus an odds-ratio term."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..record import Supervised


@pairwise(
    source="arXiv 2403.07691 eq. 4, 7",
    status="checked against TRL",
    reads=("logp", "length"),
    score="mean_logp",
    rewards=core.plain_mean_logp,
    supervised=Supervised("nll_weight", 1.0),
)
def orpo(chosen: SeqStats, rejected: SeqStats, *, lam: float = 0.1) -> Tensor:  # [P]
    """ORPO: logistic loss of the log odds ratio of the mean log-probabilities.

    l = lam softplus(-(o(chosen) - o(rejected))),  o = x - log(1 - e^x), x = mean_logp,
    objective: mean l + nll_weight * NLL(chosen) per token of the batch

    Hong et al. 2024 (arXiv 2403.07691), eq. 4, 7. x is capped at -1e-6, where the odds are finite.
    In TRL, and by default in the authors' code, the likelihood term also scores the prompt:
    preference_loss(..., likelihood_targets=targets that do).

    Args:
        lam: Weight of the odds-ratio term, >= 0 (TRL calls it beta).
    """
    core.not_negative("lam", lam)
    odds = core.difference(links.log_odds(chosen.mean_logp), links.log_odds(rejected.mean_logp))
    return lam * links.logistic(odds)
