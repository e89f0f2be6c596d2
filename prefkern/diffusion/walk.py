"""Sampling: a denoiser walks from noise to a sample, one Gaussian transition after the other.

Shapes: B samples, n steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedule import CLEAN, Schedule

# denoiser(x [B, ...], time [B], cond) -> prediction [B, ...]
Denoiser = Callable[[Tensor, Tensor, Any], Tensor]


class Transition(NamedTuple):
    """One step of a walk: what was there, what was predicted, where it went."""

    x: Tensor  # [B, ...]
    level: Tensor  # [B]
    pred: Tensor  # [B, ...]
    mean: Tensor  # [B, ...]
    sigma: Tensor  # [B] fp64
    next: Tensor  # [B, ...]
    to: Tensor  # [B]


def ladder(schedule: Schedule, steps: int, *, top: int | None = None) -> Tensor:  # [n+1]
    """Levels of a walk in equal steps from `top` (default the noisiest) down to CLEAN.

    Raises:
        ValueError: steps that are not in [1, top + 1].
    """
    top = len(schedule) - 1 if top is None else top
    if not 0 <= top < len(schedule):
        raise ValueError(f"top must be a level in [0, {len(schedule)}), got {top}.")
    if not 1 <= steps <= top + 1:
        raise ValueError(f"steps must be in [1, {top + 1}] for levels 0 ... {top}, got {steps}.")
    places = torch.arange(steps, -1, -1, dtype=torch.float64) * (top + 1) / steps
    return places.round().long() + CLEAN


@torch.no_grad()
def walk(
    denoiser: Denoiser,
    x: Tensor,  # [B, ...]
    cond: Any,
    schedule: Schedule,
    levels: Tensor,  # [n+1] or [n+1, B]
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Transition]:
    """The transitions from levels[0] to levels[-1], without gradient.

    Args:
        denoiser: `denoiser(x, time, cond)` -> the schedule's kind of prediction.
        x: `[B, ...]` samples at levels[0]; noise where that is the last level of the schedule.
        cond: What the denoiser takes beside them, for these B samples.
        levels: `[n+1]` falling, the same for all samples, or `[n+1, B]`; the last may be CLEAN.
        eta: 0 for DDIM, 1 for ancestral sampling. Default 0.

    Raises:
        ValueError: levels that rise or lie outside the schedule, a prediction of another shape.
    """
    if levels.dim() not in (1, 2) or len(levels) < 2:
        raise ValueError(f"levels must be [n+1] or [n+1, B], got {list(levels.shape)}.")
    if levels.dim() == 1:
        levels = levels[:, None].expand(-1, len(x))
    levels = levels.to(x.device)
    for level, to in itertools.pairwise(levels):
        pred = denoiser(x, schedule.time(level), cond)
        mean, sigma = schedule.step(pred, x, level, to, eta=eta)
        following = draw(mean, sigma, generator).to(x.dtype)
        yield Transition(x, level, pred, mean, sigma, following, to)
        x = following


def draw(mean: Tensor, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample of the transition: mean + sigma eps."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + sigma.reshape(-1, *[1] * (mean.dim() - 1)).to(mean.dtype) * noise


def sample(
    denoiser: Denoiser,
    x: Tensor,  # [B, ...]
    cond: Any,
    schedule: Schedule,
    levels: Tensor,  # [n+1] or [n+1, B]
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # [B, ...]
    """Where the walk ends; arguments as in `walk`."""
    for step in walk(denoiser, x, cond, schedule, levels, eta=eta, generator=generator):
        x = step.next
    return x


def noised_twins(
    denoiser: Denoiser,
    clean: Tensor,  # [B, ...]
    cond: Any,
    schedule: Schedule,
    *,
    top: int,
    steps: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Two samples that share the structure of a real one: noised to `top` twice, denoised again.

    DenseDPO (arXiv 2506.03517) compares such twins segment by segment.
    """
    level = torch.full((len(clean),), top, device=clean.device)
    twins = []
    for _ in range(2):
        noise = torch.randn(
            clean.shape, generator=generator, device=clean.device, dtype=clean.dtype
        )
        x = schedule.add_noise(clean, noise, level)
        twins.append(sample(denoiser, x, cond, schedule, ladder(schedule, steps, top=top)))
    return twins[0], twins[1]
