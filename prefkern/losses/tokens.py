"""Pieces shared by the tokenwise losses: checked [N] inputs and sums over the scored tokens.

Shapes: N packed tokens, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import ragged
from ..ops.segment_sum import segment_sum
from ..stats import TokenStats
from . import core


def field(tokens: TokenStats, name: str, scored: Tensor) -> Tensor:  # [N]
    """The statistic `name`, 0 where a token does not count."""
    value = getattr(tokens, name)
    if value is None:
        have = [f for f in tokens._fields if getattr(tokens, f) is not None]
        raise ValueError(
            f"this loss needs the token statistic {name!r} [N], but only {have} are there; ask the "
            f"ops for it (stats=(..., {name!r}))."
        )
    if scored.dtype != torch.bool or scored.shape != value.shape:
        raise ValueError(
            f"scored must be a bool tensor {list(value.shape)} (True where a token counts), got "
            f"{scored.dtype} {list(scored.shape)}."
        )
    return torch.where(scored, value, 0.0)


def given(name: str, value: Tensor | None, like: Tensor, scored: Tensor) -> Tensor:  # [N]
    """A constant tensor of the caller, 0 where a token does not count."""
    return torch.where(scored, core.data(name, value, like), 0.0)


def count(scored: Tensor, cu_seqlens: Tensor) -> Tensor:  # [S] fp64
    return segment_sum(scored.to(torch.float32), cu_seqlens)


def sequence_mean(values: Tensor, scored: Tensor, cu_seqlens: Tensor) -> Tensor:  # [S] fp64
    """Mean over the scored tokens of each sequence; 0 for an empty one."""
    total = segment_sum(torch.where(scored, values, 0.0), cu_seqlens)
    return total / count(scored, cu_seqlens).clamp(min=1.0)


def per_token(name: str, value: Tensor, scored: Tensor, cu_seqlens: Tensor) -> Tensor:  # [N]
    """A constant per sequence [S] or per token [N], as one number per token."""
    sequences = cu_seqlens.numel() - 1
    if not isinstance(value, Tensor) or tuple(value.shape) not in ((sequences,), scored.shape):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name} must be [S] = [{sequences}] or [N] = {list(scored.shape)}, got {got}."
        )
    core.real(name, value)
    if value.shape == scored.shape:
        return torch.where(scored, value.detach(), 0.0)
    return torch.where(scored, ragged.spread(value.detach(), cu_seqlens, scored.numel()), 0.0)
