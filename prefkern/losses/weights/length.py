"""Token weights by position: the tail of the longer answer counts less (LD-DPO), later tokens do
(D2PO).

Shapes: N packed tokens, S sequences. `scored` [N] is True where a token counts (its target is not
ignored); weights are exactly 0 elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import ragged
from ..record import TokenWeights


def ld_dpo(
    cu_seqlens: Tensor,  # [S+1]
    scored: Tensor,  # [N]
    public_length: Tensor,  # [S]
    *,
    alpha: float = 0.5,
) -> TokenWeights:
    """Length desensitisation: 1 for the first `public_length` scored tokens, alpha for the rest.

    Liu et al. 2024 (arXiv 2409.06411), as implemented in TRL.

    Args:
        cu_seqlens: `[S+1]` boundaries of the sequences.
        scored: `[N]` bool, tokens that count.
        public_length: `[S]` the smaller number of scored tokens of the pair a sequence belongs to.
        alpha: Weight of the tail in [0, 1], default 0.5; 1 is DPO, 0 truncates.

    Returns:
        Constant weights `[N]`, 0 on tokens that do not count.

    Raises:
        ValueError: alpha outside [0, 1], shapes that differ.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}; 1 is plain DPO.")
    owner = ragged.owner(cu_seqlens, scored.numel())
    ordinal = _ordinal(cu_seqlens, scored)
    one = ordinal.new_ones((), dtype=torch.float64)  # alpha = 0.4 in fp32 is off by 1.5e-8
    weights = torch.where(ordinal <= public_length[owner], one, alpha)
    return TokenWeights(torch.where(scored, weights, 0.0))


def d2po(
    cu_seqlens: Tensor,  # [S+1]
    scored: Tensor,  # [N]
    *,
    decay: float = 0.98,
) -> TokenWeights:
    """Temporal decay: decay^t on the t-th scored token of each answer, t = 0, 1, ...

    Shao et al. 2025 (arXiv 2502.14340), second-hand.

    Args:
        cu_seqlens: `[S+1]` boundaries of the sequences.
        scored: `[N]` bool, tokens that count.
        decay: Weight of a token relative to the one before it, in (0, 1]; default 0.98, 1 is DPO.

    Returns:
        Constant weights `[N]`, 0 on tokens that do not count.

    Raises:
        ValueError: decay outside (0, 1].
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"decay must be in (0, 1], got {decay}; 1 is plain DPO.")
    exponent = (_ordinal(cu_seqlens, scored) - 1).clamp(min=0).double()
    return TokenWeights(torch.where(scored, decay**exponent, 0.0))


def _ordinal(cu_seqlens: Tensor, scored: Tensor) -> Tensor:  # [N]
    """Scored tokens of its sequence up to each token, this one included: 1 on the first."""
    position = scored.cumsum(0)  # over the whole batch
    before = torch.cat([position.new_zeros(1), position])[cu_seqlens[:-1].long()]  # [S]
    return position - before[ragged.owner(cu_seqlens, scored.numel())]
