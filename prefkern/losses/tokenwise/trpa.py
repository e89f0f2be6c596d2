"""TRPA: preference levels of rollouts, all pairs, inside a trust region around the old policy."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import ragged
from ...ops.list_rank import list_rank
from ...ops.segment_sum import segment_sum
from ...stats import TokenStats
from .. import core, links
from .. import tokens as token
from ..declare import tokenwise
from ..lists import Lists


@tokenwise(
    source="arXiv 2504.04524",
    status="pairwise loss and k3 term checked against the authors' code; paper body not read",
    reference=True,
)
def trpa(
    tokens: TokenStats,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    scored: Tensor,  # [N]
    cu_groups: Tensor,  # [G+1]
    preference_levels: Tensor,  # [S]
    old_logp: Tensor | None = None,  # [N]
    beta: float = 0.1,
    anisotropy: float = 2.5,
    tr_kl_loss_coef: float = 0.001,
    sqrt_kl: bool = False,
    fallback: bool = True,
    pairs_per_sequence: float | None = None,
    tokens_per_sequence: float | None = None,
    backend: str = "auto",
) -> Tensor:  # [S]
    """TRPA: logistic loss of every ordered pair of a prompt's rollouts, plus a k3 penalty.

    l = mean over pairs of softplus(-b_ij (g_i - g_j)) + tr_kl_loss_coef mean over tokens of k3,
    g = mean over tokens of logp - ref_logp,  b_ij = beta, times anisotropy where i has level 1,
    k3 = e^-d - 1 + d clamped to +-10,  d = logp - old_logp

    Su et al. 2025 (arXiv 2504.04524), as in the authors' code. Where no pair exists in the batch it
    falls back to softplus(-g) for level 1 and softplus(g) for the others, without beta.

    Args:
        cu_groups: `[G+1]` boundaries of the rollouts of one prompt, on the sequence axis.
        preference_levels: `[S]` integers from 1, the best.
        old_logp: `[N]` log-probabilities under the policy that sampled; None: the policy itself (no
            penalty).
        beta: > 0.
        anisotropy: Extra scale where the better rollout has level 1, > 0.
        tr_kl_loss_coef: Weight of the penalty, >= 0.
        sqrt_kl: Takes sqrt(mean k3 + 0.25) instead.
        fallback: What the code does without pairs; False gives 0 there.
        pairs_per_sequence, tokens_per_sequence: Ordered pairs and tokens over a whole step of
            several micro-batches, divided by its sequences; None: the batch's own. With sqrt_kl the
            penalty is a mean over micro-batches all the same.

    Returns:
        `[S]` fp64, coupled through the batch: its mean over the sequences is the loss, each
        prompt's pairs spread evenly over its rollouts.
    """
    core.positive("beta", beta)
    core.positive("anisotropy", anisotropy)
    core.not_negative("tr_kl_loss_coef", tr_kl_loss_coef)
    if pairs_per_sequence is not None:
        core.not_negative("pairs_per_sequence", pairs_per_sequence)
    logp = token.field(tokens, "logp", scored)
    g = token.sequence_mean(logp - token.field(tokens, "ref_logp", scored), scored, cu_seqlens)
    level = core.data("preference_levels", preference_levels, g)
    top = level == 1
    rest = list_rank(  # better rollout below level 1: those of level 1 are never the worse one
        beta * g, torch.where(top, torch.nan, -level), cu_groups, family="pair", backend=backend
    )
    best = list_rank(
        beta * anisotropy * g, top.to(g.dtype), cu_groups, family="pair", backend=backend
    )
    group = ragged.owner(cu_groups, g.numel())
    size = torch.zeros_like(rest).index_add(0, group, torch.ones_like(g))
    if pairs_per_sequence is None:
        pairs = Lists(torch.zeros_like(g), -level, cu_groups, backend).pairs().sum()
    else:
        pairs = g.new_tensor(pairs_per_sequence * g.numel())
    fewest = torch.where(pairs > 0, pairs, 1.0)  # a share of a step's pairs may be below 1
    preference = ((rest + best) / size.clamp(min=1))[group] * g.numel() / fewest
    if fallback:
        lone = links.logistic(torch.where(top, g, -g))
        preference = torch.where(pairs > 0, preference, lone)
    old = logp.detach() if old_logp is None else token.given("old_logp", old_logp, logp, scored)
    k3 = links.kl_estimate(logp - old, "k3").clamp(-10.0, 10.0)
    length = token.count(scored, cu_seqlens)
    share = core.per_token(segment_sum(k3, cu_seqlens), length, tokens_per_sequence)
    if sqrt_kl:
        share = (share.mean() + 0.25).sqrt().expand_as(share)
    return preference + tr_kl_loss_coef * share
