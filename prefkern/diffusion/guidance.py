"""Sampling with a negative model: guidance away from it, and mixtures of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .walk import Denoiser


class Guided(nn.Module):
    """negative + scale (positive - negative), a denoiser of two.

    Classifier-free guidance where both are one model, the negative without its caption;
    Diffusion-NPO and Self-NPO where the negative is their model.

    Args:
        positive, negative: Denoisers.
        scale: 1 is `positive` alone, more leads away from `negative`.
        negative_cond: What the negative takes instead of the given condition. Default None, the
            same.
    """

    def __init__(
        self, positive: Denoiser, negative: Denoiser, scale: float, *, negative_cond: Any = None
    ) -> None:
        super().__init__()
        if not abs(scale) < float("inf"):
            raise ValueError(f"scale must be a finite number, got {scale}.")
        self.positive, self.negative, self.scale = positive, negative, scale
        self.negative_cond = negative_cond

    def forward(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        other = cond if self.negative_cond is None else self.negative_cond
        pushed = self.negative(x, time, other)
        return pushed + self.scale * (self.positive(x, time, cond) - pushed)


def mixed_weights(
    base: Mapping[str, Tensor], *parts: tuple[float, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """base + sum of factor (weights - base), state dicts of one architecture.

    Diffusion-NPO's negative model is the base with a share of the preference-trained offset and one
    of its own (arXiv 2505.11245): mixed_weights(base, (a, preferred), (b, negative)).

    Raises:
        ValueError: state dicts with different names.
    """
    for _, part in parts:
        if part.keys() != base.keys():
            odd = sorted(part.keys() ^ base.keys())[:5]
            raise ValueError(f"the state dicts must have the same names, these differ: {odd}.")
    found = {}
    for name, value in base.items():
        if not value.is_floating_point():
            found[name] = value.clone()
            continue
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        found[name] = (wide + sum(f * (part[name] - wide) for f, part in parts)).to(value.dtype)
    return found
