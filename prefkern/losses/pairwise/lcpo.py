"""LCPO (RE-PO): expectation-maximisation over which labels are right, around a base loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise

BASES = ("dpo", "ipo")


def update(
    eta: float,
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.01,
    base: str = "dpo",
    ema: float = 0.1,
) -> float:
    """The reliability of one annotator after a batch of their pairs:
    (1 - ema) eta + ema mean posterior."""
    contrast = _contrast(chosen, rejected, beta, base)
    if contrast.numel() == 0:
        return eta
    return (1.0 - ema) * eta + ema * posterior(contrast, eta).mean().item()


@pairwise(
    source="arXiv 2509.24159",
    status="a detailed note with equations; official code not available",
    reference=True,
    update=update,
)
def lcpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    eta: float | Tensor = 0.9,  # [P]
    beta: float = 0.01,
    base: str = "dpo",
) -> Tensor:  # [P]
    """LCPO: soft labels from the posterior that a label is right, given the model and the
    annotator.

    l = w softplus(-D) + (1 - w) softplus(D),  w = sigmoid(stopgrad(D) + logit(eta)),
    D = base loss with the label reversed less the base loss: beta A (dpo), 2 A / beta (ipo, sums),
    A = logratio(chosen) - logratio(rejected)

    arXiv 2509.24159. At the first step w = eta: label smoothing with 1 - eta.

    Args:
        eta: Reliability of the annotator of each pair, number or `[P]`, kept within [1e-4, 1 -
            1e-4]; prefkern.losses.pairwise.lcpo.update gives the next.
        beta: Of the base loss, > 0.
        base: "dpo" or "ipo".
    """
    contrast = _contrast(chosen, rejected, beta, base)
    weight = posterior(contrast, eta)
    return links.logistic(contrast, weight, 1.0 - weight)


def posterior(contrast: Tensor, eta: float | Tensor) -> Tensor:  # [P]
    """Probability that each label is right: sigmoid(D + logit(eta)), constant."""
    if not isinstance(eta, Tensor) and not 0.0 < eta < 1.0:
        raise ValueError(f"eta must be in (0, 1), got {eta}.")
    like = contrast.detach()
    eta = torch.as_tensor(core.per_item("eta", eta, like), dtype=like.dtype, device=like.device)
    return torch.sigmoid(like + torch.logit(eta.clamp(1e-4, 1.0 - 1e-4)))


def _contrast(chosen: SeqStats, rejected: SeqStats, beta: float, base: str) -> Tensor:  # [P]
    core.positive("beta", beta)
    core.choice("base", base, BASES)
    gap = core.logratio_gap(chosen, rejected)
    return beta * gap if base == "dpo" else (2.0 / beta) * gap
