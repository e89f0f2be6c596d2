"""Binary classifier optimization on pairs."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        delta: Reward shift, a number or 0-d tensor, constant; TRL fixes 0 since 0.29, older
            versions keep a running mean of rewards. Default 0.
        beta: Strength of the pull to the reference, > 0, default 0.01.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    core.positive("beta", beta)
    core.same_items(chosen, rejected)
    shift = core.scalar("delta", delta, chosen.logratio)
    good = links.logistic(beta * chosen.logratio - shift)
    return good + links.logistic(shift - beta * rejected.logratio)


BCO_PAIR = Loss(
    bco_pair,
    "bco_pair",
    "pairwise",
    needs_reference=True,
    status="checked against TRL",
    source="arXiv 2404.04656",
    rewards=core.logratio_rewards,
)
