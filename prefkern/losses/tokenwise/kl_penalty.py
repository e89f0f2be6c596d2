"""Sampled KL penalties k1, k2, k3 as a term beside other losses."""

from __future__ import annotations

from torch import Tensor

from ...stats import TokenStats
from .. import links
from .. import tokens as token
from ..declare import tokenwise


@tokenwise(
    source="arXiv 2402.03300 for k3",
    status="standard algebra",
    reference=True,
    items="scored_tokens",
)
def kl_penalty(
    tokens: TokenStats,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    scored: Tensor,  # [N]
    estimator: str = "k3",
    coef: float = 1.0,
) -> Tensor:  # [N]
    """A per-token estimate of KL(policy || reference) from the sampled token alone.

    l = coef k,  k1 = d,  k2 = d^2 / 2,  k3 = e^-d - 1 + d,  d = logp - ref_logp

    Schulman's estimators, k3 as in GRPO (arXiv 2402.03300). They estimate that KL only on tokens
    drawn from the policy. Their gradients differ: k2's is that of KL(policy || reference) in
    expectation, k3's that of KL(reference || policy), k1's is 0. The objective divides by the
    number of tokens.

    Args:
        cu_seqlens: `[S+1]` boundaries of the sequences, not read.
        estimator: "k1", "k2" or "k3".
        coef: Weight.

    Returns:
        `[N]`, 0 where a token does not count.
    """
    gap = token.field(tokens, "logp", scored) - token.field(tokens, "ref_logp", scored)
    return coef * links.kl_estimate(gap, estimator)
