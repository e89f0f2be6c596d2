"""D2PO: DPO whose earlier tokens count more."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from ..declare import formula, pairwise
from ..weights import length
from .dpo import dpo


@pairwise(
    source="arXiv 2502.14340",
    status="second-hand description; no official code found",
    reference=True,
    weights=length.d2po,
)
def d2po(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """D2PO (temporal decay): the t-th scored token of an answer weighs decay^t.

    l = softplus(-beta (logratio(chosen) - logratio(rejected))),
    logratio = sum_t decay^t (log p - log r),  t = 0, 1, ...

    on policy and reference (weight stage prefkern.losses.weights.d2po). decay = 1 is DPO.

    Shao et al. 2025 (arXiv 2502.14340).
    """
    return formula(dpo)(chosen, rejected, beta=beta)
