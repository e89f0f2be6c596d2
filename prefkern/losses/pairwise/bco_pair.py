"""Binary classifier optimization on pairs."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(source="arXiv 2404.04656", status="checked against TRL", reference=True)
def bco_pair(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    delta: float | Tensor = 0.0,  # []
    beta: float = 0.01,
) -> Tensor:  # [P]
    """BCO for pairs: classifies chosen answers as good and rejected ones as bad, around a shift.

    l = softplus(-(beta logratio(chosen) - delta)) + softplus(beta logratio(rejected) - delta)

    Jung et al. 2024 (arXiv 2404.04656), pair form of TRL; its documentation prints DPO's formula.

    Args:
        delta: Reward shift, a number or 0-d tensor, constant; TRL fixes 0 since 0.29, older
            versions keep a running mean of rewards.
    """
    core.positive("beta", beta)
    core.same_items(chosen, rejected)
    shift = core.scalar("delta", delta, chosen.logratio)
    good = links.logistic(beta * chosen.logratio - shift)
    return good + links.logistic(shift - beta * rejected.logratio)
