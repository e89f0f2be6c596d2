"""MaPO: SparsePO's margin under a mask read off the model's activations, without parameters."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..record import Loss, WeightStage
from ..weights import token_weights
from .sparsepo import sparsepo


def mapo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """MaPO (mask preference optimization): SparsePO's loss with one constant activation mask.

    l = softplus(-beta [logratio(chosen) - logratio(rejected) + fkl(chosen) - fkl(rejected)])

    with both sums taken under the mask of token_weights.mapo.

    Christopoulou et al. 2024 (arXiv 2410.05102), as in the authors' code. Not the diffusion loss
    of the same name.

    Args:
        chosen, rejected: Masked statistics of the two answers, each field `[P]`; needs `ref_logp`
            and `fkl`.
        beta: Strength of the pull to the reference, > 0, default 0.1.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, a missing statistic, shapes that differ.
    """
    return sparsepo(chosen, rejected, beta=beta)


MAPO = Loss(
    mapo,
    "mapo",
    "pairwise",
    stats=("logp", "fkl"),
    needs_reference=True,
    status="mask values and loss checked against the authors' code (its fp16 rounding removed)",
    source="arXiv 2410.05102",
    weights=WeightStage(
        token_weights.mapo,
        given=("cu_seqlens", "scored"),
        extra=("activations", "hook_type"),
    ),
    rewards=core.token_rewards,
)
