"""Alignment by optimal transport: compares sorted margins of the batch, not pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(source="arXiv 2406.05882", status="checked against TRL", reference=True)
def aot(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
    paired: bool = True,
) -> Tensor:  # [P]
    """AOT: logistic loss of the differences of two sorted samples (first-order dominance).

    l_k = (1 - eps) softplus(-m_k) + eps softplus(m_k),  m_k = beta (u_(k) - v_(k)),
    with u and v each sorted ascending,
    u = logp(chosen) - logp(rejected), v the same under the reference (paired);
    u = logratio(chosen), v = logratio(rejected) (unpaired)

    Melnyk et al. 2024 (arXiv 2406.05882). The result depends on what is in the batch.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `logp`, `ref_logp`.
            Unpaired answers may belong to different prompts.
        paired: True compares margins, False answers.

    Returns:
        Unreduced loss `[P]`, in ascending order of the sorted samples.
    """
    core.positive("beta", beta)
    core.same_items(chosen, rejected)
    if paired:
        u = core.difference(chosen.require("logp"), rejected.require("logp"))
        v = chosen.require("ref_logp") - rejected.require("ref_logp")
    else:
        u, v = chosen.logratio, rejected.logratio
    # Stable sorts: a tie does not change the loss, but it decides which row receives the gradient.
    gap = torch.sort(u, stable=True).values - torch.sort(v, stable=True).values
    return links.smoothed_logistic(beta * gap, label_smoothing)
