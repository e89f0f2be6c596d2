"""ASFT: absolute odds of each answer instead of their ratio."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss, Supervised


def asft(
    chosen: SeqStats, rejected: SeqStats, *, lam: float = 0.1, beta: float = 1.0
) -> Tensor:  # [P]
    """ASFT: raises the odds of the chosen answer and lowers those of the rejected one.

    l = lam [softplus(-beta o(chosen)) + softplus(beta o(rejected))],  o = x - log(1 - e^x),
    x = mean_logp,  objective: mean l + nll_weight * mean over pairs of NLL(chosen) / length

    Wang et al. 2024 (arXiv 2409.10571), as restated in arXiv 2502.01237.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `length`.
        lam: Weight of the alignment terms, >= 0, default 0.1.
        beta: Temperature of the odds, > 0, default 1.

    Returns:
        Unreduced loss `[P]`, without the likelihood term (weight `nll_weight`, default 1).

    Raises:
        ValueError: lam < 0, beta <= 0, shapes that differ.
    """
    core.not_negative("lam", lam)
    core.positive("beta", beta)
    core.same_items(chosen, rejected)
    good = links.logistic(beta * links.log_odds(chosen.mean_logp))
    bad = links.logistic(-beta * links.log_odds(rejected.mean_logp))
    return lam * (good + bad)


def _rewards(seq: SeqStats, **_: Any) -> Tensor:
    return seq.mean_logp


ASFT = Loss(
    asft,
    "asft",
    "pairwise",
    status="restated in a later paper; the paper itself was not read and has no code",
    source="arXiv 2409.10571, arXiv 2502.01237",
    rewards=_rewards,
    supervised=Supervised("nll_weight", 1.0, mode="seq"),
    logps="mean_logp",
)
