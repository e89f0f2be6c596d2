"""DPO-positive (Smaug): a penalty inside the margin when the chosen answer becomes less likely."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2402.13228",
    status="formula second-hand, defaults from several independent implementations",
    reference=True,
)
def dpop(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.3,
    lam: float = 50.0,
) -> Tensor:  # [P]
    """DPOP: DPO's margin less a penalty for falling below the reference on the chosen answer.

    l = softplus(-m),
    m = beta [logratio(chosen) - logratio(rejected) - lam max(0, -logratio(chosen))]

    Pal et al. 2024 (arXiv 2402.13228). At the first step the penalty is at its kink, where its
    derivative is taken as 0.

    Args:
        lam: Weight of the penalty, >= 0.
    """
    core.positive("beta", beta)
    core.not_negative("lam", lam)
    gap = core.logratio_gap(chosen, rejected)
    return links.logistic(beta * (gap - lam * torch.relu(-chosen.logratio)))
