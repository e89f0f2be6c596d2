"""ASFT: absolute odds of each answer instead of their ratio."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..record import Supervised


@pairwise(
    source="arXiv 2409.10571, arXiv 2502.01237",
    status="restated in a later paper; the paper itself was not read and has no code",
    reads=("logp", "length"),
    score="mean_logp",
    rewards=core.plain_mean_logp,
    supervised=Supervised("nll_weight", 1.0, mode="seq"),
)
def asft(
    chosen: SeqStats, rejected: SeqStats, *, lam: float = 0.1, beta: float = 1.0
) -> Tensor:  # [P]
    """ASFT: raises the odds of the chosen answer and lowers those of the rejected one.

    l = lam [softplus(-beta o(chosen)) + softplus(beta o(rejected))],  o = x - log(1 - e^x),
    x = mean_logp,  objective: mean l + nll_weight * mean over pairs of NLL(chosen) / length

    Wang et al. 2024 (arXiv 2409.10571), as restated in arXiv 2502.01237.

    Args:
        lam: Weight of the alignment terms, >= 0.
        beta: Temperature of the odds, > 0.
    """
    core.not_negative("lam", lam)
    core.positive("beta", beta)
    core.same_items(chosen, rejected)
    good = links.logistic(beta * links.log_odds(chosen.mean_logp))
    bad = links.logistic(-beta * links.log_odds(rejected.mean_logp))
    return lam * (good + bad)
