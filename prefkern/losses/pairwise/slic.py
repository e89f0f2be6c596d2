"""SLiC-HF: a hinge on summed log-probabilities beside a likelihood term, without a reference."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..record import Supervised


@pairwise(
    source="arXiv 2305.10425",
    status="HALOs' code read; its regulariser is not followed",
    supervised=Supervised("lam", 0.1, mode="sum"),
)
def slic_hf(chosen: SeqStats, rejected: SeqStats, *, delta: float = 1.0) -> Tensor:  # [P]
    """SLiC-HF calibration: how much the log-probability margin falls short of delta.

    l = max(0, delta - logp(chosen) + logp(rejected)),  objective: mean l + lam * mean NLL(chosen)

    Zhao et al. 2023 (arXiv 2305.10425). The derivative at the kink is 0.

    Args:
        delta: Margin in nats, > 0.
    """
    core.positive("delta", delta)
    gap = core.difference(chosen.require("logp"), rejected.require("logp"))
    return links.hinge_loss(gap, delta)
