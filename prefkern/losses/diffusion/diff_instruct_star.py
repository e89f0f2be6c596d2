"""Diff-Instruct*: a one-step generator against a reward and a score-based divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from .. import core
from ..declare import diffusion
from . import errors


@diffusion(
    source="arXiv 2410.20898",
    status="provisional: weights of the divergence not read",
    reference=True,
    rewards=errors.error_rewards,
)
def diff_instruct_star(
    score_dot: Tensor,  # [B]
    score_gap: Tensor,  # [B]
    *,
    reward: Tensor | None = None,  # [B]
    alpha: float = 1.0,
    c: float = 1.0,
    weight: float | Tensor = 1.0,  # [B]
) -> Tensor:  # [B]
    """Surrogate of a generator's loss: minus its reward plus a pseudo-Huber score divergence.

    l = -alpha reward - w (y . v) / sqrt(||y||^2 + c^2),  y = s_fake - s_ref held constant,
    v = s_fake(x_t) - grad log q(x_t | x_0)

    After the idea of arXiv 2410.20898; its weights w(t) and c were not read. Both inputs are sums
    over a sample from one pass: r = error_sum(v, s_fake.detach(), s_ref, stats=("dot", "ref_err"),
    reduction="sum"), score_dot = r.dot, score_gap = r.ref_err. Only v carries the gradient,
    -w y / sqrt(||y||^2 + c^2).

    Args:
        score_dot: `[B]` y . v.
        score_gap: `[B]` ||y||^2. Constant.
        reward: `[B]` reward of the generated sample, differentiable; None: no reward term.
        alpha: Weight of the reward, >= 0.
        c: Width of the pseudo-Huber distance, > 0.
        weight: w(t) of each sample, >= 0; a number or `[B]`.

    Returns:
        Unreduced loss `[B]`.
    """
    core.positive("c", c)
    core.not_negative("alpha", alpha)
    core.not_negative("weight", weight)
    for name, value in (("score_dot", score_dot), ("score_gap", score_gap)):
        checks.check_float(name, value)
        errors.one_per_sample(name, value)
    checks.check_constant("score_gap", score_gap)
    length = torch.sqrt(core.data("score_gap", score_gap, score_dot) + c * c)
    loss = -core.per_item("weight", weight, score_dot) * score_dot / length
    if reward is None:
        return loss
    return core.difference(loss, alpha * reward.to(loss.dtype))
