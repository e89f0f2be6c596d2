"""APO-zero for unpaired answers: KTO without a baseline."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..record import Loss
from .kto import kto


def apo_zero_unpaired(
    seq: SeqStats,
    *,
    desirable: Tensor,  # [S] bool
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:  # [S]
    """APO-zero, unpaired: KTO's loss with the baseline at 0.

    l = desirable_weight sigmoid(-beta a)      where desirable,
    l = undesirable_weight sigmoid(beta a)     elsewhere,  a = logratio

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7, as in TRL's KTO trainer.

    Args:
        seq: Statistics of the answers, each field `[S]`; needs `ref_logp`.
        desirable: `[S]` bool, True where the answer is desirable.
        beta: Strength of the pull to the reference, > 0, default 0.1.
        desirable_weight: Factor of desirable answers, >= 0, default 1.
        undesirable_weight: Factor of undesirable answers, >= 0, default 1.

    Returns:
        Unreduced loss `[S]`.

    Raises:
        ValueError: desirable is not a bool tensor `[S]`, beta <= 0, a negative weight.
    """
    return kto(
        seq,
        desirable=desirable,
        kl_baseline=0.0,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


APO_ZERO_UNPAIRED = Loss(
    apo_zero_unpaired,
    "apo_zero_unpaired",
    "pointwise",
    needs_reference=True,
    extra=("desirable",),
    status="checked against TRL",
    source="arXiv 2408.06266 eq. 7",
    rewards=core.logratio_rewards,
)
