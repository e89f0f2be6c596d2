"""APO-zero for unpaired answers: KTO without a baseline."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from ..declare import formula, pointwise
from .kto import kto


@pointwise(source="arXiv 2408.06266 eq. 7", status="checked against TRL", reference=True)
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
    """
    return formula(kto)(
        seq,
        desirable=desirable,
        kl_baseline=0.0,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
