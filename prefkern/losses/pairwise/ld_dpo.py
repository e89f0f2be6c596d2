"""LD-DPO: DPO with the tail of the longer answer damped."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..record import Loss, WeightStage
from ..weights import token_weights
from .dpo import dpo


def ld_dpo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """LD-DPO (length-desensitised DPO): the tokens beyond the shorter answer count alpha.

    l = softplus(-beta (logratio(chosen) - logratio(rejected)))

    with token weight 1 up to the length of the shorter answer and alpha after it, on policy and
    reference (weight stage token_weights.ld_dpo). alpha = 1 is DPO, alpha = 0 truncates.

    Liu et al. 2024 (arXiv 2409.06411), as implemented in TRL.

    Args:
        chosen, rejected: Weighted statistics of the two answers, each field `[P]`; needs
            `ref_logp`.
        beta: Strength of the pull to the reference, > 0, default 0.1.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    return dpo(chosen, rejected, beta=beta)


LD_DPO = Loss(
    ld_dpo,
    "ld_dpo",
    "pairwise",
    needs_reference=True,
    status="TRL's code read; paper formula second-hand",
    source="arXiv 2409.06411",
    weights=WeightStage(token_weights.ld_dpo, given=("cu_seqlens", "scored", "public_length")),
    rewards=core.logratio_rewards,
)
