"""Agreement of two internal preference estimates: a judge's and DPO's implicit one."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2502.08922",
    status="provisional: the symmetric KL, the entropy term and gradients into both estimates are "
    "guesses; the paper's penalty was not read",
    reference=True,
)
def scir(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    judge_logit_gap: Tensor,  # [P]
    beta: float = 0.1,
    lam: float = 1.0,
    lambda_entropy: float = 0.1,
    consistent_only: bool = True,
) -> Tensor:  # [P]
    """DPO where both estimates agree, plus a penalty on their disagreement and on doubt.

    l = [agree] softplus(-m) + lam 1/2 [KL(p_G || p_I) + KL(p_I || p_G)]
        + lambda_entropy [H(p_G) + H(p_I)],
    p_I = sigmoid(m),  m = beta (logratio(chosen) - logratio(rejected)),  p_G = sigmoid(gap)

    A form of this package after the description of self-consistent internal rewards
    (arXiv 2502.08922), whose penalty was not read; gradients reach both estimates.

    Args:
        judge_logit_gap: `[P]` logit of the judge's answer "chosen is better" minus that of the
            other; may require grad.
        lam: Weight of the disagreement, >= 0.
        lambda_entropy: Weight of the entropies, >= 0.
        consistent_only: Leaves the DPO term out where gap and m have opposite signs.
    """
    core.positive("beta", beta)
    core.not_negative("lam", lam)
    core.not_negative("lambda_entropy", lambda_entropy)
    margin = beta * core.logratio_gap(chosen, rejected)
    if judge_logit_gap.shape != margin.shape:
        raise ValueError(
            f"judge_logit_gap must be [P] = {list(margin.shape)}, one per pair, got "
            f"{list(judge_logit_gap.shape)}."
        )
    core.real("judge_logit_gap", judge_logit_gap)
    judge = judge_logit_gap.to(margin.dtype)
    doubt, judge_doubt = links.logistic(margin), links.logistic(judge)
    lose, judge_lose = torch.sigmoid(-margin), torch.sigmoid(-judge)
    loss = doubt
    if consistent_only:
        loss = torch.where(judge * margin >= 0.0, doubt, 0.0)
    # the two Bernoulli KLs add up to (S(-m) - S(-g)) (g - m), and H = softplus(-x) + x S(-x)
    apart = (lose - judge_lose) * (judge - margin)
    entropy = doubt + margin * lose + (judge_doubt + judge * judge_lose)
    return loss + 0.5 * lam * apart + lambda_entropy * entropy
