"""SLiC-HF: a hinge on summed log-probabilities beside a likelihood term, without a reference."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss, Supervised


def slic_hf(chosen: SeqStats, rejected: SeqStats, *, delta: float = 1.0) -> Tensor:  # [P]
    """SLiC-HF calibration: how much the log-probability margin falls short of delta.

    l = max(0, delta - logp(chosen) + logp(rejected)),  objective: mean l + lam * mean NLL(chosen)

    Zhao et al. 2023 (arXiv 2305.10425). The derivative at the kink is 0.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`.
        delta: Margin in nats, > 0, default 1.0.

    Returns:
        Unreduced loss `[P]`, without the likelihood term (weight `lam`, default 0.1, of summed
        NLL).

    Raises:
        ValueError: delta <= 0, shapes that differ.
    """
    core.positive("delta", delta)
    gap = core.difference(chosen.require("logp"), rejected.require("logp"))
    return links.hinge(gap, delta)


SLIC_HF = Loss(
    slic_hf,
    "slic_hf",
    "pairwise",
    status="HALOs' code read; its regulariser is not followed",
    source="arXiv 2305.10425",
    rewards=core.logp_rewards,
    supervised=Supervised("lam", 0.1, mode="sum"),
)
