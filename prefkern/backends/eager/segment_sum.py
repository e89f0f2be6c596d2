"""Eager twin of segment_sum: fp64 sums over the pieces of a packed axis."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum_fwd(
    values: Tensor,  # [m, N]
    weights: Tensor | None,  # [N] or [m, N]
    cu_seqlens: Tensor,  # [S+1]
) -> Tensor:  # [m, S] fp64
    """sum_{i in segment} weights_i values_i, accumulated in fp64; a weight of 0 hides any value."""
    x = values.double()
    if weights is not None:
        w = weights.double().expand_as(x)
        x = torch.where(w == 0, 0.0, w * x)
    rows, segments = x.shape[0], cu_seqlens.numel() - 1
    # Tokens of no segment go to one before the first and one behind the last.
    out = x.new_zeros((rows, segments + 2))
    return out.index_add_(1, _place(cu_seqlens, values.shape[1]), x)[:, 1:-1].contiguous()


def segment_sum_bwd(
    d_out: Tensor,  # [m, S]
    values: Tensor,  # [m, N]
    weights: Tensor | None,
    cu_seqlens: Tensor,
    need_values: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """(d_values [m, N], d_weights like weights); [0] where not needed."""
    padded = torch.nn.functional.pad(d_out.double(), (1, 1))
    d = padded.index_select(1, _place(cu_seqlens, values.shape[1]))  # [m, N]
    d_values, d_weights = values.new_empty(0), values.new_empty(0)
    if need_values:
        full = d if weights is None else torch.where(d == 0, 0.0, d * weights.double())
        d_values = full.to(values.dtype)
    if need_weights:
        assert weights is not None
        full = torch.where(d == 0, 0.0, d * values.double())
        d_weights = (full.sum(0) if weights.dim() == 1 else full).to(weights.dtype)
    return d_values, d_weights


def _place(cu_seqlens: Tensor, n: int) -> Tensor:  # [N]
    """Number of boundaries at or before each token: 1 in the first segment, S in the last."""
    positions = torch.arange(n, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True)
