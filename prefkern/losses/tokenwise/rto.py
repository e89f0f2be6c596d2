"""RTO: PPO on token rewards of a DPO-trained model, actor and critic."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import TokenStats
from .. import core, links
from .. import tokens as token
from ..declare import tokenwise


@tokenwise(
    source="arXiv 2404.18922 eq. 4.5-4.7",
    status="paper read; reward shaping, GAE, actor and critic checked against the authors' code",
)
def rto(
    tokens: TokenStats,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    scored: Tensor,  # [N]
    advantages: Tensor,  # [S] or [N]
    old_logp: Tensor | None = None,  # [N]
    value_pred: Tensor | None = None,  # [N]
    old_values: Tensor | None = None,  # [N]
    returns: Tensor | None = None,  # [N]
    eps_clip: float = 0.2,
    value_clip: float = 0.2,
) -> Tensor:  # [S]
    """PPO's actor and critic, as RTO trains on its token rewards.

    l = mean_t -min(r A, clip(r, 1 - eps_clip, 1 + eps_clip) A)
        + 1/2 mean_t max((V - G)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - G)^2),
    r = exp(logp - old_logp)

    Zhong et al. 2024 (arXiv 2404.18922). Token rewards:
    prefkern.losses.advantages.rto_rewards; advantages and returns G: gae of the same module,
    whitened over the buffer.

    Args:
        advantages: `[N]` (or `[S]`) A. Constant.
        value_pred: `[N]` V of the value head, with gradient; None leaves the critic out.
        old_values: `[N]` V when the responses were sampled; needed with value_pred.
        returns: `[N]` G; needed with value_pred.
        eps_clip: Clip of the ratio.
        value_clip: Clip of the change of V.
    """
    core.not_negative("eps_clip", eps_clip)
    core.not_negative("value_clip", value_clip)
    logp = token.field(tokens, "logp", scored)
    old = logp.detach() if old_logp is None else token.given("old_logp", old_logp, logp, scored)
    advantage = token.per_token("advantages", advantages, scored, cu_seqlens).to(logp.dtype)
    actor = links.clipped_gain(logp - old, advantage, eps_clip)
    loss = token.sequence_mean(actor, scored, cu_seqlens)
    if value_pred is None:
        return loss
    core.difference(value_pred, logp)
    before = token.given("old_values", old_values, logp, scored)
    target = token.given("returns", returns, logp, scored)
    value = torch.where(scored, value_pred, 0.0).to(logp.dtype)
    held = before + (value - before).clamp(-value_clip, value_clip)
    critic = torch.maximum((value - target).square(), (held - target).square())
    return loss + 0.5 * token.sequence_mean(critic, scored, cu_seqlens)
