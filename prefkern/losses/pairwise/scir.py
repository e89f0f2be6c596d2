"""Agreement of two internal preference estimates: a judge's and DPO's implicit one."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        judge_logit_gap: `[P]` logit of the judge's answer "chosen is better" minus that of the
            other; may require grad.
        beta: Strength of the pull to the reference, > 0, default 0.1.
        lam: Weight of the disagreement, >= 0, default 1.
        lambda_entropy: Weight of the entropies, >= 0, default 0.1.
        consistent_only: Leaves the DPO term out where gap and m have opposite signs, default True.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, a negative weight, shapes that differ.
    """
    core.positive("beta", beta)
    core.not_negative("lam", lam)
    core.not_negative("lambda_entropy", lambda_entropy)
    margin = beta * core.logratio_gap(chosen, rejected)
    if not isinstance(judge_logit_gap, Tensor) or judge_logit_gap.shape != margin.shape:
        raise ValueError(
            f"judge_logit_gap must be a tensor [P] = {list(margin.shape)}, the judge's logit for "
            "the chosen answer minus that for the rejected one."
        )
    judge = judge_logit_gap.to(margin.dtype)
    loss: Tensor = _Agreement.apply(margin, judge, lam, lambda_entropy, consistent_only)
    return loss


class _Agreement(torch.autograd.Function):
    """The loss and its two slopes in one go: thirty passes over [P] are half of that by autograd.

    With a = S(-m), b = S(-g), S' = S(-x) S(x): the two Bernoulli KLs add up to (a - b) (g - m), and
    H = softplus(-x) + x S(-x), whose slope is -x S'(x).
    """

    @staticmethod
    def forward(ctx, margin, judge, lam, lambda_entropy, consistent_only):  # [P], [P] -> [P]
        half = 0.5 * lam
        doubt, other = links.logistic(margin), links.logistic(judge)
        lose, judge_lose = torch.sigmoid(-margin), torch.sigmoid(-judge)
        apart, gap = lose - judge_lose, judge - margin
        if consistent_only:
            agree = (judge * margin).ge_(0.0)
            loss = doubt * agree
        else:
            agree, loss = torch.ones_like(margin), doubt.clone()
        loss.addcmul_(apart, gap, value=half)
        loss.add_(
            doubt.addcmul_(margin, lose).add_(other.addcmul_(judge, judge_lose)),
            alpha=lambda_entropy,
        )
        slopes: list[Tensor | None] = []
        for x, low, sign in ((margin, lose, -1.0), (judge, judge_lose, 1.0)):
            if not ctx.needs_input_grad[len(slopes)]:
                slopes.append(None)
                continue
            curve = low - low * low
            slope = torch.addcmul(apart, curve, gap).mul_(sign * half)
            slopes.append(slope.addcmul_(curve, x, value=-lambda_entropy))
        if slopes[0] is not None:
            slopes[0].addcmul_(agree, lose, value=-1.0)
        ctx.save_for_backward(*slopes)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return (*(None if s is None else grad * s for s in ctx.saved_tensors), None, None, None)


SCIR = Loss(
    scir,
    "scir",
    "pairwise",
    needs_reference=True,
    extra=("judge_logit_gap",),
    status="provisional: the paper's penalty and its stop-gradients were not read",
    source="arXiv 2502.08922",
    rewards=core.logratio_rewards,
)
