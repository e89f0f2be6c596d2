"""DiscoPOP: a loss found by a language model, between logistic and exponential."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2406.08414 eq. 5",
    status="checked against the authors' code and TRL in their finite range",
    reference=True,
)
def discopop(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.05,
    tau: float = 0.05,
) -> Tensor:  # [P]
    """DiscoPOP (log-ratio modulated): logistic below 0, exponential above, blended by a gate.

    l = softplus(-m) (1 - M) + exp(-m) M,  M = sigmoid(m / tau),
    m = beta (logratio(chosen) - logratio(rejected))

    Lu et al. 2024 (arXiv 2406.08414), eq. 5. Not convex near 0. The exponents are merged: forming
    exp(-m) overflows at m < -88 in fp32.

    Args:
        tau: Temperature of the gate, in (0, 1].
    """
    core.positive("beta", beta)
    return links.log_ratio_modulated(beta * core.logratio_gap(chosen, rejected), tau)
