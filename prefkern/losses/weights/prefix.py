"""Token weights from what went before: IW-OPD.

Shapes: N packed tokens, S sequences. `scored` [N] is True where a token counts (its target is not
ignored); weights are exactly 0 elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import ragged
from ...ops.segment_sum import segment_sum
from .. import core
from ..record import TokenWeights

DIVERGENCES = ("sampled", "rkl", "fkl")


def iw_opd(
    logp: Tensor,  # [N]
    ref_logp: Tensor,  # [N]
    scored: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    divergence: str = "sampled",
    gamma: float = 0.5,
) -> TokenWeights:
    """Position weights: tokens whose prefix still agrees with the teacher count up to 1 + gamma.

    w_t = 1 + gamma (1 - sum_{j<t} |a_j| / sum_j |a_j|),  a_t = ref_logp_t - logp_t

    Xie et al. 2026 (arXiv 2606.22600), as TRL's experimental trainer has it.

    Args:
        logp: `[N]` log-probability of each token under the student (the policy). Constant.
        ref_logp: `[N]` the same under the teacher (the reference).
        scored: `[N]` bool, tokens that count.
        cu_seqlens: `[S+1]` boundaries of the sequences.
        divergence: "sampled" also weighs logp by a_t, "rkl" and "fkl" weigh that statistic.
        gamma: Strength, >= 0, default 0.5; 0 weighs all tokens alike.

    Returns:
        Constant weights `[N]` of the statistic that the divergence reads. Where student and teacher
        agree on every token the weights are 1 + gamma.

    Raises:
        ValueError: gamma < 0, an unknown divergence, shapes that differ.
    """
    core.choice("divergence", divergence, DIVERGENCES)
    core.not_negative("gamma", gamma)
    for name, value in (("logp", logp), ("ref_logp", ref_logp)):
        core.same_shape(name, value, "scored", scored)
    gain = torch.where(scored, ref_logp.detach() - logp.detach(), 0.0).double()
    size = gain.abs()
    total = segment_sum(size, cu_seqlens)  # [S]
    so_far = size.cumsum(0)
    start = torch.cat([so_far.new_zeros(1), so_far])[cu_seqlens[:-1].long()]  # [S]
    owner = ragged.owner(cu_seqlens, scored.numel())
    before = (so_far - size - start[owner]).clamp(min=0.0)
    tiny = torch.finfo(torch.float64).tiny
    weights = 1.0 + gamma * (1.0 - (before / total.double()[owner].clamp(min=tiny)).clamp(max=1.0))
    if divergence == "sampled":
        return TokenWeights({"logp": torch.where(scored, weights * gain, 0.0)})
    return TokenWeights({divergence: torch.where(scored, weights, 0.0)})
