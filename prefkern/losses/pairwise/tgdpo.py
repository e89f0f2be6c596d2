"""TGDPO: DPO with token weights guided by the token rewards of a frozen model."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from ..declare import formula, pairwise
from ..weights import model_ratios
from .dpo import dpo


@pairwise(
    source="arXiv 2506.14574",
    status="loss and logit gradients checked against the authors' code; theorems second-hand",
    reference=True,
    weights=model_ratios.tgdpo,
)
def tgdpo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """TGDPO: logistic loss of the margin of token-weighted log-ratios.

    l = softplus(-beta (logratio(chosen) - logratio(rejected)))

    with every token weighted by f = 1 +- alpha beta log(aux / reference), which the weight stage
    prefkern.losses.weights.tgdpo forms; alpha = 0 is DPO.

    Zhu et al. 2025 (arXiv 2506.14574), as in the authors' code, with the training beta.
    """
    return formula(dpo)(chosen, rejected, beta=beta)
