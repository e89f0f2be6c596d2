"""Uni-DPO: pairs weighted by their quality and by what the policy has already learned of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2506.10054",
    status="authors' code read (its three settings differ; the text one is the default here)",
    reference=True,
    reads=("logp", "length"),
)
def uni_dpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    score_chosen: Tensor,  # [P]
    score_rejected: Tensor,  # [P]
    beta: float = 2.0,
    eta: float = 0.1,
    gamma: float = 1.0,
    tau_ref: float = 0.8,
    nll_weight: float = 0.01,
    tau_good: float = 7.0,
    length_norm: bool = True,
) -> Tensor:  # [P]
    """Uni-DPO: quality weight times focal weight times DPO, and likelihood of good lost answers.

    l = sigmoid(eta (s_w - s_l)) sigmoid(tau_ref - beta d)^gamma softplus(-beta m)
        - nll_weight [log p(y_w) < log r(y_w) and s_w >= tau_good] log p(y_w),
    m = logratio(chosen) - logratio(rejected),  d = log p(y_w) - log p(y_l)

    with means per token for length_norm, sums otherwise; the gradient passes through the focal
    weight, as in the authors' code.

    Peng et al. 2025 (arXiv 2506.10054).

    Args:
        score_chosen, score_rejected: `[P]` scores of the two answers by a judge. Constant.
        beta: Scale of the margin, > 0.
        eta: Scale of the difference of the scores, >= 0; at 0 every pair has quality 1/2.
        gamma: Exponent of the focal weight, >= 0; 0 is none.
        tau_ref: Policy margin beta d at which the focal weight's base is 1/2.
        nll_weight: Weight of the likelihood term, >= 0.
        tau_good: Score from which an answer is good.
        length_norm: Means per token instead of sums.
    """
    core.positive("beta", beta)
    for name, value in (("eta", eta), ("gamma", gamma), ("nll_weight", nll_weight)):
        core.not_negative(name, value)
    gap = core.logratio_gap(chosen, rejected)
    better = core.data("score_chosen", score_chosen, gap)
    worse = core.data("score_rejected", score_rejected, gap)
    logp, other, ratio = chosen.require("logp"), rejected.require("logp"), chosen.logratio
    if length_norm:
        gap = core.difference(chosen.mean_logratio, rejected.mean_logratio)
        logp, other, ratio = chosen.mean_logp, rejected.mean_logp, chosen.mean_logratio
    focal = torch.exp(gamma * logsigmoid(tau_ref - beta * core.difference(logp, other)))
    loss = torch.sigmoid(eta * (better - worse)) * focal * links.logistic(beta * gap)
    lost = (ratio.detach() < 0) & (better >= tau_good)
    return loss - nll_weight * torch.where(lost, logp, 0.0)
