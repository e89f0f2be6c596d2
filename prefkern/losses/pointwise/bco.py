"""Binary classifier optimization: good against bad answers, around a running mean reward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pointwise


class BcoState(NamedTuple):
    """Mean of all rewards seen so far and their number; belongs in the checkpoint."""

    mean: float = 0.0
    count: int = 0  # type: ignore[assignment]  # the public field name hides tuple.count


def update(state: BcoState, seq: SeqStats, *, beta: float = 0.1) -> BcoState:
    """The state after this batch's rewards; call it before the loss (it waits for the device)."""
    rewards = beta * seq.logratio.detach()
    count = state.count + rewards.numel()
    if count == 0:
        return state
    return BcoState((state.mean * state.count + rewards.double().sum().item()) / count, count)


@pointwise(
    source="arXiv 2404.04656", status="checked against TRL 1.10", reference=True, update=update
)
def bco(
    seq: SeqStats,
    *,
    desirable: Tensor,  # [S] bool
    delta: float | Tensor,  # []
    undesirable_weight: float | Tensor = 1.0,  # [S]
    beta: float = 0.1,
) -> Tensor:  # [S]
    """BCO: logistic classification of rewards around the shift delta.

    l = softplus(-(beta a - delta))                        where desirable,
    l = undesirable_weight softplus(beta a - delta)        elsewhere,  a = logratio

    Jung et al. 2024 (arXiv 2404.04656). delta is the mean of all rewards seen, this batch included:
    state = update(state, seq, beta=beta); bco(..., delta=state.mean).

    Args:
        delta: Reward shift, a number or 0-d tensor, constant: the mean of the state that
            prefkern.losses.pointwise.bco.update gives.
        undesirable_weight: Factor of undesirable answers, number or `[S]`;
            prefkern.losses.pointwise.bco.density_weight makes one.
        beta: Strength of the pull to the reference, > 0; the paper uses 0.01.

    Returns:
        Unreduced loss `[S]`; its mean runs over all rows, both labels together.
    """
    core.positive("beta", beta)
    core.not_negative("undesirable_weight", undesirable_weight)
    reward = beta * seq.logratio
    desirable = core.boolean("desirable", desirable, reward)
    above = reward - core.scalar("delta", delta, reward)
    weight = core.per_item("undesirable_weight", undesirable_weight, reward)
    return torch.where(desirable, links.logistic(above), weight * links.logistic(-above))


def density_weight(probability: Tensor) -> Tensor:  # [S]
    """Underlying distribution matching: clip(p / (1 - p + 1e-8), 0.5, 10).

    The weight of undesirable answers, p `[S]` being the probability, according to a classifier of
    prompts, that the prompt is one of a desirable answer.
    """
    return (probability / (1.0 - probability + 1e-8)).clamp(0.5, 10.0)
