"""GRPO's token loss over advantages of any origin, several objectives included."""

from __future__ import annotations

from torch import Tensor

from ...ops.segment_sum import segment_sum
from ...stats import TokenStats
from .. import core, links
from .. import tokens as token
from ..record import Loss

AGGREGATIONS = ("grpo", "bnpo", "dapo", "dr_grpo")


def grpo(
    tokens: TokenStats,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    scored: Tensor,  # [N]
    advantages: Tensor,  # [S] or [N]
    old_logp: Tensor | None = None,  # [N]
    eps: float = 0.2,
    beta: float = 0.04,
    aggregation: str = "grpo",
    tokens_per_sequence: float | None = None,
    max_length: int | None = None,
) -> Tensor:  # [S]
    """GRPO: clipped policy gradient with a k3 penalty towards the reference.

    l = sum over tokens of [-min(r A, clip(r, 1 - eps, 1 + eps) A) + beta k3] / divisor,
    r = exp(logp - old_logp),  k3 = e^-d - 1 + d,  d = logp - ref_logp

    The divisor makes the mean over sequences what the name says: "grpo" the sequence's length,
    "bnpo" and "dapo" the mean length over the batch or, where tokens_per_sequence gives it, over
    all micro-batches and ranks of a step ("bnpo" leaves that to the caller; TRL's is local),
    "dr_grpo" max_length.

    Shao et al. 2024 (arXiv 2402.03300); with advantages of several objectives
    (prefkern.losses.advantages.group_advantages) multi-objective GRPO (arXiv 2503.21819).

    Args:
        tokens: Token statistics, each field `[N]`; needs `logp`, and `ref_logp` for beta > 0.
        cu_seqlens: `[S+1]` boundaries of the responses.
        scored: `[N]` bool, tokens of the response.
        advantages: `[S]` per response or `[N]` per token. Constant.
        old_logp: `[N]` log-probabilities under the policy that sampled; None, the default, is the
            policy itself (r = 1).
        eps: Clip of the ratio, default 0.2.
        beta: Weight of k3, >= 0, default 0.04; 0 reads no reference (TRL's default).
        aggregation: "grpo", "bnpo", "dapo" or "dr_grpo", default "grpo".
        tokens_per_sequence: Mean length for "bnpo" and "dapo", default None, the batch's own.
        max_length: Of "dr_grpo", the longest response there could be.

    Returns:
        Unreduced loss `[S]` fp64; an empty response gives 0.

    Raises:
        ValueError: an unknown aggregation, "dr_grpo" without max_length, a missing statistic,
            shapes that do not fit.
    """
    core.choice("aggregation", aggregation, AGGREGATIONS)
    core.not_negative("beta", beta)
    logp = token.field(tokens, "logp", scored)
    old = logp.detach() if old_logp is None else token.given("old_logp", old_logp, logp, scored)
    advantage = token.spread("advantages", advantages, scored, cu_seqlens).to(logp.dtype)
    value = links.clipped_gain(logp - old, advantage, eps)
    if beta:
        value = value + beta * links.kl_estimate(
            logp - token.field(tokens, "ref_logp", scored), "k3"
        )
    if aggregation == "grpo":
        return token.sequence_mean(value, scored, cu_seqlens)
    total = segment_sum(value, cu_seqlens)
    if aggregation == "dr_grpo":
        if max_length is None:
            raise ValueError("aggregation 'dr_grpo' divides by max_length; pass it.")
        return total / max_length
    return core.per_token(total, token.count(scored, cu_seqlens), tokens_per_sequence)


GRPO = Loss(
    grpo,
    "grpo",
    "tokenwise",
    needs_reference=True,
    extra=("scored", "advantages"),
    status="loss checked against Liger (grpo, bnpo); reward mix of the multi-objective paper "
    "second-hand",
    source="arXiv 2402.03300, arXiv 2503.21819",
    rewards=core.logratio_rewards,
    reference_weight="beta",
)
