"""Anchored preference optimization: each answer's likelihood moves in a stated direction."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(source="arXiv 2408.06266 eq. 7", status="checked against TRL", reference=True)
def apo_zero(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """APO-zero: raises the chosen answer and lowers the rejected one, each on its own.

    l = sigmoid(-beta logratio(chosen)) + sigmoid(beta logratio(rejected))

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7.
    """
    core.positive("beta", beta)
    core.same_items(chosen, rejected)
    good = links.zero_one(beta * chosen.logratio)
    return good + links.zero_one(-beta * rejected.logratio)


@pairwise(source="arXiv 2408.06266 eq. 8", status="checked against TRL", reference=True)
def apo_down(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """APO-down: lowers both answers, the rejected one more.

    l = sigmoid(beta logratio(chosen)) + sigmoid(-beta (logratio(chosen) - logratio(rejected)))

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8. At the first step the chosen answer's
    gradient is exactly 0.
    """
    core.positive("beta", beta)
    gap = core.logratio_gap(chosen, rejected)
    return links.zero_one(-beta * chosen.logratio) + links.zero_one(beta * gap)
