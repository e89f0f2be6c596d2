"""FocalPO: DPO that weighs pairs by how right the policy already ranks them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2501.06645",
    status="factor and exponent second-hand, after the paper's summary; its code is not released",
    reference=True,
)
def focal_po(
    chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1, gamma: float = 0.05
) -> Tensor:  # [P]
    """FocalPO: DPO times the probability of the right ranking, to the power gamma.

    l = sigmoid(m)^gamma softplus(-m),  m = beta (logratio(chosen) - logratio(rejected))

    so that misranked pairs weigh less and pairs ranked right more, against the focal loss of
    vision. The gradient passes through the factor: dl/dm = p^gamma (gamma (1 - p) softplus(-m)
    - (1 - p)) with p = sigmoid(m).

    Liu et al. 2025 (arXiv 2501.06645).

    Args:
        gamma: Exponent of the factor, >= 0; 0 is DPO.
    """
    core.positive("beta", beta)
    core.not_negative("gamma", gamma)
    margin = beta * core.logratio_gap(chosen, rejected)
    return torch.exp(gamma * logsigmoid(margin)) * links.logistic(margin)
