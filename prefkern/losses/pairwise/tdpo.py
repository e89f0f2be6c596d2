"""Token-level DPO: the sequence KL(reference || policy) enters the margin. Two versions."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2404.11999",
    status="loss and logit gradients checked against the authors' code",
    reference=True,
    reads=("logp", "fkl"),
    rewards=core.token_rewards,
)
def tdpo1(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.1) -> Tensor:  # [P]
    """TDPO1: the difference of the two sequence KLs is subtracted from DPO's margin.

    l = softplus(-beta (u - d)),  u = logratio(chosen) - logratio(rejected),
    d = fkl(rejected) - fkl(chosen),  fkl = sum over tokens of KL(reference || policy)

    Zeng et al. 2024 (arXiv 2404.11999), as in the authors' code. Gradients flow through both KLs.
    """
    core.positive("beta", beta)
    gap = core.difference(chosen.logratio, rejected.logratio)
    return links.logistic(beta * (gap + (chosen.require("fkl") - rejected.require("fkl"))))


@pairwise(
    source="arXiv 2404.11999",
    status="loss and logit gradients checked against the authors' code",
    reference=True,
    reads=("logp", "fkl"),
    rewards=core.token_rewards,
)
def tdpo2(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    alpha: float = 0.5,
    beta: float = 0.1,
) -> Tensor:  # [P]
    """TDPO2: TDPO1 with the KL difference damped by alpha and the chosen KL held constant.

    l = softplus(-beta (u - alpha d)),  u = logratio(chosen) - logratio(rejected),
    d = fkl(rejected) - stopgrad(fkl(chosen)),  fkl = sum over tokens of KL(reference || policy)

    Zeng et al. 2024 (arXiv 2404.11999), as in the authors' code. alpha = 0 is DPO.

    Args:
        alpha: Weight of the KL difference, >= 0.
    """
    core.positive("beta", beta)
    if alpha < 0:
        raise ValueError(f"alpha must be >= 0, got {alpha}; 0 is plain DPO.")
    gap = core.difference(chosen.logratio, rejected.logratio)
    kl_gap = rejected.require("fkl") - chosen.require("fkl").detach()
    return links.logistic(beta * (gap - alpha * kl_gap))
