"""GRPO's token loss over advantages of any origin, several objectives included."""

from __future__ import annotations

from torch import Tensor

from ...ops.segment_sum import segment_sum
from ...stats import TokenStats
from .. import core, links
from .. import tokens as token
from ..declare import tokenwise

AGGREGATIONS = ("grpo", "bnpo", "dapo", "dr_grpo")


@tokenwise(
    source="arXiv 2402.03300, arXiv 2503.21819",
    status="loss checked against Liger (grpo, bnpo); reward mix of the multi-objective paper "
    "second-hand",
    reference="beta",
)
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
        advantages: `[S]` per response or `[N]` per token. Constant.
        eps: Clip of the ratio.
        beta: Weight of k3, >= 0; 0, TRL's default, reads no reference.
        aggregation: "grpo", "bnpo", "dapo" or "dr_grpo".
        tokens_per_sequence: Mean length for "bnpo" and "dapo"; None: the batch's own.
        max_length: Of "dr_grpo", the longest response there could be.
    """
    core.choice("aggregation", aggregation, AGGREGATIONS)
    core.not_negative("eps", eps)
    core.not_negative("beta", beta)
    if tokens_per_sequence is not None:
        core.positive("tokens_per_sequence", tokens_per_sequence)
    if max_length is not None:
        core.positive("max_length", max_length)
    logp = token.field(tokens, "logp", scored)
    old = logp.detach() if old_logp is None else token.given("old_logp", old_logp, logp, scored)
    advantage = token.per_token("advantages", advantages, scored, cu_seqlens).to(logp.dtype)
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
