"""LD-DPO: DPO with the tail of the longer answer damped."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from ..declare import formula, pairwise
from ..weights import length
from .dpo import dpo


@pairwise(
    source="arXiv 2409.06411",
    status="TRL's code read; paper formula second-hand",
    reference=True,
    weights=length.ld_dpo,
)
def ld_dpo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """LD-DPO (length-desensitised DPO): the tokens beyond the shorter answer count alpha.

    l = softplus(-beta (logratio(chosen) - logratio(rejected)))

    with token weight 1 up to the length of the shorter answer and alpha after it, on policy and
    reference (weight stage prefkern.losses.weights.ld_dpo). alpha = 1 is DPO, alpha = 0 truncates.

    Liu et al. 2024 (arXiv 2409.06411), as implemented in TRL.
    """
    return formula(dpo)(chosen, rejected, beta=beta)
