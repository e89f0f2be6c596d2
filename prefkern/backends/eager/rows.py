"""Which rows are scored, and the logits of those rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scored(NamedTuple):
    """Rows to compute: `index` [M] picks them; `mask` [M] says which of them count (None: all)."""

    index: Tensor  # type: ignore[assignment]  # the field hides tuple.index
    mask: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """x[index]; rows that do not count become 0, so that NaN or inf in them cannot spread."""
        x = x.index_select(0, self.index)
        if self.mask is None:
            return x
        return torch.where(self.mask.reshape(-1, *[1] * (x.dim() - 1)), x, torch.zeros_like(x))

    def put(self, x: Tensor, n: int, dim: int = 0) -> Tensor:
        """Places the M computed rows of x at their places among n; exactly 0 elsewhere."""
        if self.mask is not None:
            shape = [1] * x.dim()
            shape[dim] = -1
            x = torch.where(self.mask.reshape(shape), x, torch.zeros_like(x))
        shape = list(x.shape)
        shape[dim] = n
        return x.new_zeros(shape).index_copy_(dim, self.index, x)


def scored_rows(targets: Tensor, ignore_index: int, num_scored: int | None) -> Scored:
    """Rows whose target is not ignored. On CUDA their number is `num_scored`; None synchronises
    once, or, under graph capture, keeps every row and masks."""
    keep = targets != ignore_index
    if num_scored is not None:
        index = torch.nonzero_static(keep, size=num_scored, fill_value=0).flatten()
        return Scored(index, None)
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        return Scored(torch.arange(targets.numel(), device=targets.device), keep)
    return Scored(keep.nonzero().flatten(), None)


def shape_logits(
    x: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> Tensor:
    """softcap * tanh(scale * (x + bias) / softcap) / temperature."""
    if bias is not None:
        x = x + bias.to(x.dtype)
    x = x * scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def logit_slope(
    z: Tensor, scale: float, softcap: float | None, temperature: float
) -> Tensor | float:
    """dz/dx of `shape_logits`, from its result."""
    if softcap is None:
        return scale / temperature
    return scale / temperature * (1 - (z * temperature / softcap) ** 2)


def fold_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(hidden: Tensor, weight: Tensor, *, exact: bool) -> Tensor:
    """hidden @ weight.T [M, V] in fp32 (fp64). exact: inputs are multiplied in fp32, so that logits
    are not rounded to a 16-bit type (a KL of 4.5e-4 nats would be off by 46 %)."""
    acc = fold_dtype(hidden.dtype)
    weight = weight.to(hidden.dtype)
    if exact:
        return hidden.to(acc) @ weight.to(acc).T
    return (hidden @ weight.T).to(acc)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Products as the backward reads them: rounded to the working dtype, before bias, scale and cap
    (the slope of a cap near saturation would not survive rounding after it)."""
    return x.to(dtype).to(x.dtype)
