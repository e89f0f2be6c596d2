"""DiscoPOP: a loss found by a language model, between logistic and exponential."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        beta: Strength of the pull to the reference, > 0, default 0.05.
        tau: Temperature of the gate, in (0, 1], default 0.05.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, tau outside (0, 1], shapes that differ.
    """
    core.positive("beta", beta)
    return links.log_ratio_modulated(beta * core.logratio_gap(chosen, rejected), tau)


DISCOPOP = Loss(
    discopop,
    "discopop",
    "pairwise",
    needs_reference=True,
    status="checked against the authors' code and TRL in their finite range",
    source="arXiv 2406.08414 eq. 5",
    rewards=core.logratio_rewards,
)
