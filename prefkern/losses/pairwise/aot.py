"""Alignment by optimal transport: compares sorted margins of the batch, not pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
            Unpaired answers may belong to different prompts.
        beta: Strength of the pull to the reference, > 0, default 0.01.
        label_smoothing: Probability eps in [0, 0.5] that a label is wrong, default 0.
        paired: True compares margins, False answers; default True.

    Returns:
        Unreduced loss `[P]`, in ascending order of the sorted samples.

    Raises:
        ValueError: beta <= 0, label_smoothing outside [0, 0.5], shapes that differ.
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


AOT = Loss(
    aot,
    "aot",
    "pairwise",
    needs_reference=True,
    status="checked against TRL",
    source="arXiv 2406.05882",
    rewards=core.logratio_rewards,
)
