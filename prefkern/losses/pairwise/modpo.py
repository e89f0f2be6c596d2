"""Multi-objective DPO: one trained preference, the others as known rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


def _rewards(seq: SeqStats, *, beta: float, w: Sequence[float], **_: Any) -> Tensor:
    """The part of the reward that the policy sets; the other objectives' rewards are left out."""
    return beta * seq.logratio / w[0]


@pairwise(
    source="arXiv 2310.03708",
    status="checked against the authors' code",
    reference=True,
    rewards=_rewards,
)
def modpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    margin_reward_chosen: Tensor,  # [P, n-1]
    margin_reward_rejected: Tensor,  # [P, n-1]
    w: Sequence[float] = (0.5, 0.5),
    beta: float = 0.1,
    link: str = "sigmoid",
) -> Tensor:  # [P]
    """MODPO: DPO on what is left of the margin after the other objectives' rewards.

    l = softplus(-m),
    m = [beta (logratio(chosen) - logratio(rejected)) - w_1: . (R(chosen) - R(rejected))] / w_0

    Zhou et al. 2023 (arXiv 2310.03708).

    Args:
        margin_reward_chosen: `[P, n-1]` rewards of the other objectives for the chosen answer.
        margin_reward_rejected: `[P, n-1]` the same for the rejected answer.
        w: n weights of the objectives, w_0 > 0 that of the trained preference.
    """
    core.positive("beta", beta)
    core.positive("w[0]", w[0])
    core.choice("link", link, ("sigmoid", "hinge"))
    gap = core.logratio_gap(chosen, rejected)
    like = gap.new_empty(*gap.shape, len(w) - 1)
    rewards = core.data("margin_reward_chosen", margin_reward_chosen, like) - core.data(
        "margin_reward_rejected", margin_reward_rejected, like
    )
    margin = (beta * gap - rewards @ torch.tensor(w[1:], dtype=gap.dtype, device=gap.device)) / w[0]
    return links.hinge_loss(margin) if link == "hinge" else links.logistic(margin)
