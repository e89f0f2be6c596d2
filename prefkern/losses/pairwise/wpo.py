"""WPO: pairs weighted by how likely the current policy would have written them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2406.11827 eq. 2",
    status="checked against the authors' code, and TRL without the clamp",
    reference=True,
    reads=("logp", "col", "length"),
    read_as={"col": "constant"},
)
def wpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
    clamp: bool = True,
) -> Tensor:  # [P]
    """WPO: DPO with the weight of each pair from the policy's own probabilities.

    l = w [(1 - eps) softplus(-m) + eps softplus(m)],
    m = beta (logratio(chosen) - logratio(rejected)),
    w = min(1, exp(A(chosen) + A(rejected))),  A = mean over tokens of log p_y - log sum_v p_v^2

    Zhou et al. 2024 (arXiv 2406.11827), eq. 2. w is constant. TRL since 0.29 does not clamp.

    Args:
        clamp: Bounds w by 1, as the authors do.
    """
    core.positive("beta", beta)
    margin = beta * core.logratio_gap(chosen, rejected)
    weight = torch.exp(_aligned_mean(chosen) + _aligned_mean(rejected))
    if clamp:
        weight = weight.clamp(max=1.0)
    return weight * links.smoothed_logistic(margin, label_smoothing)


def _aligned_mean(seq: SeqStats) -> Tensor:  # [P]
    total = seq.require("logp") - seq.require("col")
    return (total / seq.require("length").clamp(min=1)).detach()
