"""Margin-adaptive DPO: pairs weighted by a reward model's margin."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2510.05342 v1",
    status="checked against the authors' code; the paper's second version was not read",
    reference=True,
)
def madpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    rm_margin: Tensor,  # [P]
    beta: float = 0.1,
    c_max: float = 2.0,
    c_min: float = 0.5,
    lam: float = 1.0,
    tau: float = math.log(999.0),
) -> Tensor:  # [P]
    """MADPO: DPO with a weight above 1 on hard pairs and below 1 on easy or contradicted ones.

    l = w softplus(-m),  m = beta (logratio(chosen) - logratio(rejected)),
    w = sigmoid(c h) / sigmoid(h) where h > -tau, else 1,
    c = c_min + (c_max - c_min) / (1 + K exp(lam (|h| - tau))),  K = (c_max - 1) / (1 - c_min)

    arXiv 2510.05342, first version, as in the authors' code with stable exponentials.

    Args:
        rm_margin: `[P]` reward model's score of chosen minus rejected, h. Constant.
        c_max: Largest coefficient, > 1.
        c_min: Smallest coefficient, < 1.
        lam: Steepness of the transition.
        tau: |h| at which the weight is 1.
    """
    core.positive("beta", beta)
    if not c_min < 1.0 < c_max:
        raise ValueError(f"c_min < 1 < c_max must hold, got c_min={c_min}, c_max={c_max}.")
    gap = core.logratio_gap(chosen, rejected)
    weight = pair_weight(core.data("rm_margin", rm_margin, gap), c_max, c_min, lam, tau)
    return weight * links.logistic(beta * gap)


def pair_weight(h: Tensor, c_max: float, c_min: float, lam: float, tau: float) -> Tensor:  # [P]
    """The weight w of reward margins h."""
    scale = (c_max - 1.0) / (1.0 - c_min)
    c = c_min + (c_max - c_min) * torch.sigmoid(-(lam * (h.abs() - tau) + math.log(scale)))
    # a margin that is no number stays one
    return torch.where(h <= -tau, 1.0, torch.exp(logsigmoid(c * h) - logsigmoid(h)))
