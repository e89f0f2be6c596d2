"""Full-Step-DPO: every step of both answers weighs by the reward of a process reward model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import ragged
from ...ops.segment_sum import segment_sum
from ...stats import TokenStats
from .. import core
from .. import tokens as token
from ..declare import tokenwise


@tokenwise(
    source="arXiv 2502.14356",
    status="read in the authors' code; paper read in abstract only",
    reference=True,
)
def full_step_dpo(
    tokens: TokenStats,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    scored: Tensor,  # [N]
    cu_groups: Tensor,  # [G+1]
    step_reward: Tensor,  # [N]
    beta: float = 0.05,
    token_rate: float = 1.0,
    reward_temp: float = 0.5,
) -> Tensor:  # [S]
    """Full-Step-DPO: DPO's gradient with a weight for every token, from its step's reward.

    l = -sigmoid(-m) (sum_t u_t logp_t of chosen - sum_t v_t logp_t of rejected),
    m = beta (logratio(chosen) - logratio(rejected)),  delta = logp - ref_logp,
    u = softmax_t(reward_temp R_t) sigmoid(-token_rate delta_t),
    v = softmax_t(-reward_temp R_t) sigmoid(token_rate delta_t)

    Xu et al. 2025 (arXiv 2502.14356), as in the authors' code: only logp_t outside m, u and v has a
    gradient, so the value says little. The good steps of the chosen answer and the bad ones of the
    rejected weigh most; a softmax over tokens gives a long step more than a short one of the same
    reward. The code leaves out tokens of reward exactly 0; here those that are not scored.

    Args:
        cu_groups: `[G+1]` boundaries of the pairs, on the sequence axis; the first answer of a
            group is the chosen one, each further one forms a pair with it.
        step_reward: `[N]` reward R of the step that a token belongs to. Constant.
        beta: > 0.
        token_rate: How fast a token that has moved from the reference loses weight, >= 0.
        reward_temp: Factor of the rewards, >= 0; 0 weighs all steps alike.

    Returns:
        `[S]` fp64: the mean over sequences is the mean over pairs in groups of two.
    """
    core.positive("beta", beta)
    core.not_negative("token_rate", token_rate)
    core.not_negative("reward_temp", reward_temp)
    logp = token.field(tokens, "logp", scored).double()
    delta = logp.detach() - token.field(tokens, "ref_logp", scored).double()
    reward = token.given("step_reward", step_reward, logp, scored)
    answers, n = cu_seqlens.numel() - 1, scored.numel()
    owner = ragged.owner(cu_seqlens, n)
    group = ragged.owner(cu_groups, answers)
    first = cu_groups.long()[group]  # [S]
    chosen = torch.arange(answers, device=scored.device) == first
    sign = torch.where(chosen, 1.0, -1.0).to(logp.dtype)[owner]
    share = _softmax(sign * reward_temp * reward, scored, cu_seqlens)
    weight = share * torch.sigmoid(-sign * token_rate * delta)
    score = segment_sum(weight * logp, cu_seqlens)
    drift = beta * segment_sum(delta, cu_seqlens)
    pair = torch.sigmoid(drift - drift[first]) * (score - score[first])
    pair = torch.where(chosen, 0.0, pair)
    pairs = (cu_groups.diff() - 1).clamp(min=1)
    total = torch.zeros_like(pairs, dtype=pair.dtype).index_add(0, group, pair)
    return (total / pairs)[group]


def _softmax(x: Tensor, scored: Tensor, cu_seqlens: Tensor) -> Tensor:  # [N]
    """Softmax over the scored tokens of each sequence, 0 elsewhere."""
    owner = ragged.owner(cu_seqlens, x.numel())
    x = torch.where(scored, x, -torch.inf)
    top = x.new_full((cu_seqlens.numel() - 1,), -torch.inf)
    top = top.scatter_reduce(0, owner, x, "amax")[owner]
    e = torch.where(scored, (x - top).exp(), 0.0)
    return e / segment_sum(e, cu_seqlens)[owner].clamp(min=torch.finfo(e.dtype).tiny)
