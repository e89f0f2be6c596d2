"""Self-play preference optimization."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2405.00675 eq. 4.7",
    status="checked against the authors' code (half, soft) and TRL (hard)",
    reference=True,
)
def sppo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    p_win: float | Tensor = 1.0,  # [P]
    p_lose: float | Tensor = 0.0,  # [P]
    beta: float = 0.001,
    half: bool = False,
) -> Tensor:  # [P]
    """SPPO: squared distance of each log-ratio from its scaled win rate.

    l = c [(logratio(chosen) - (p_win - 1/2) / beta)^2
           + (logratio(rejected) - (p_lose - 1/2) / beta)^2]

    Wu et al. 2024 (arXiv 2405.00675), eq. 4.7. The targets are hundreds of nats, so the loss starts
    near 2.5e5.

    Args:
        p_win: Win rate of the chosen answer in [0, 1], number or `[P]`; 1 is a hard label.
        p_lose: Win rate of the rejected answer.
        beta: 1 / eta of the paper, > 0.
        half: c = 1/2 as in the authors' code instead of 1 as in TRL.
    """
    core.positive("beta", beta)
    core.probability("p_win", p_win)
    core.probability("p_lose", p_lose)
    core.same_items(chosen, rejected)
    a, b = chosen.logratio, rejected.logratio
    loss = links.squared(a - (core.per_item("p_win", p_win, a) - 0.5) / beta)
    loss = loss + links.squared(b - (core.per_item("p_lose", p_lose, b) - 0.5) / beta)
    return 0.5 * loss if half else loss
