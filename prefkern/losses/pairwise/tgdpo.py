"""TGDPO: DPO with token weights guided by the token rewards of a frozen model."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..record import Loss, WeightStage
from ..weights import token_weights
from .dpo import dpo


def tgdpo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """TGDPO: logistic loss of the margin of token-weighted log-ratios.

    l = softplus(-beta (logratio(chosen) - logratio(rejected)))

    with every token weighted by f = 1 +- alpha beta log(aux / reference), which the weight stage
    token_weights.tgdpo forms; alpha = 0 is DPO.

    Zhu et al. 2025 (arXiv 2506.14574), as in the authors' code, with the training beta.

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


TGDPO = Loss(
    tgdpo,
    "tgdpo",
    "pairwise",
    needs_reference=True,
    status="loss and logit gradients checked against the authors' code; theorems second-hand",
    source="arXiv 2506.14574",
    weights=WeightStage(
        token_weights.tgdpo, given=("ref_logp", "sign", "scored"), extra=("aux_logp",)
    ),
    rewards=core.logratio_rewards,
)
