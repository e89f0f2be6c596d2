"""MaPO: SparsePO's margin under a mask read off the model's activations, without parameters."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..declare import formula, pairwise
from ..weights import masks
from .sparsepo import sparsepo


@pairwise(
    source="arXiv 2410.05102",
    status="mask values and loss checked against the authors' code (its fp16 rounding removed)",
    reference=True,
    reads=("logp", "fkl"),
    rewards=core.token_rewards,
    weights=masks.mapo,
)
def mapo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """MaPO (mask preference optimization): SparsePO's loss with one constant activation mask.

    l = softplus(-beta [logratio(chosen) - logratio(rejected) + fkl(chosen) - fkl(rejected)])

    with both sums taken under the mask of prefkern.losses.weights.mapo.

    Christopoulou et al. 2024 (arXiv 2410.05102), as in the authors' code. Not the diffusion loss
    of the same name.
    """
    return formula(sparsepo)(chosen, rejected, beta=beta)
