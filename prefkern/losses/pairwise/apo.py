"""Anchored preference optimization: each answer's likelihood moves in a stated direction."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


def apo_zero(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """APO-zero: raises the chosen answer and lowers the rejected one, each on its own.

    l = sigmoid(-beta logratio(chosen)) + sigmoid(beta logratio(rejected))

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        beta: Strength of the pull to the reference, > 0, default 0.1.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    core.positive("beta", beta)
    core.same_items(chosen, rejected)
    good = links.zero_one(beta * chosen.logratio)
    return good + links.zero_one(-beta * rejected.logratio)


def apo_down(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """APO-down: lowers both answers, the rejected one more.

    l = sigmoid(beta logratio(chosen)) + sigmoid(-beta (logratio(chosen) - logratio(rejected)))

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8. At the first step the chosen answer's
    gradient is exactly 0.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        beta: Strength of the pull to the reference, > 0, default 0.1.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    core.positive("beta", beta)
    gap = core.logratio_gap(chosen, rejected)
    return links.zero_one(-beta * chosen.logratio) + links.zero_one(beta * gap)


APO_ZERO, APO_DOWN = (
    Loss(
        fn,
        fn.__name__,
        "pairwise",
        needs_reference=True,
        status="checked against TRL",
        source=f"arXiv 2408.06266 eq. {number}",
        rewards=core.logratio_rewards,
    )
    for fn, number in ((apo_zero, 7), (apo_down, 8))
)
