"""Calibrated DPO: fixes the scale of each answer's implicit reward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


def _rewards(seq: SeqStats, **_: Any) -> Tensor:
    return seq.logratio


@pairwise(
    source="arXiv 2412.14516, arXiv 2502.01237",
    status="restated in a later paper; no runnable official code",
    reference=True,
    rewards=_rewards,
)
def cal_dpo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.001) -> Tensor:  # [P]
    """Cal-DPO: DPO's link on the plain margin, and squared distances to a calibrated reward.

    l = softplus(-(a - b)) + (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2,
    a = logratio(chosen),  b = logratio(rejected)

    Xiao et al. 2024 (arXiv 2412.14516), as restated in arXiv 2502.01237.

    Args:
        beta: Sets the calibrated log-ratios +-1 / (2 beta), > 0.
    """
    core.positive("beta", beta)
    target = 1.0 / (2.0 * beta)
    loss = links.logistic(core.logratio_gap(chosen, rejected))
    loss = loss + links.squared(chosen.logratio - target)
    return loss + links.squared(rejected.logratio + target)
