"""DDIM run backwards: the noisy sample from which a denoiser would return to a given one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .schedule import CLEAN, Schedule
from .walk import Denoiser, draw


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    clean: Tensor,  # [B, ...]
    cond: Any,
    schedule: Schedule,
    level: Tensor,  # [B]
    *,
    steps: int = 10,
    corrections: int = 0,
    average: bool = True,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # [B, ...]
    """x at `level`, in `steps` equal steps from the clean sample; without gradient.

    x_j = signal_j / signal_i (x_i - noise_i eps) + noise_j eps,  eps predicted at (x_i, j)

    A correction predicts eps again at the x_j found and steps anew from x_i (ReNoise, arXiv
    2403.14602); where it settles, x_j is the point that a DDIM step takes to x_i exactly.

    Args:
        level: `[B]` where each sample ends, in [0, T).
        steps: Steps of every sample; a sample with fewer levels stands still in some. Default 10.
        corrections: Of each step. Default 0.
        average: Step with the mean of all predictions of a step (as SmPO-Diffusion does with one
            correction) rather than with the last. Default True.
        eta: Share of the ancestral step's noise that each step adds (0.1 is DDIM-InPO's option).
            Default 0.

    Raises:
        ValueError: steps or corrections that are no counts, levels out of range.
    """
    for name, value, least in (("steps", steps, 1), ("corrections", corrections, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")
    schedule.check_level(level)
    x, at = clean, torch.full_like(level, CLEAN)
    for k in range(1, steps + 1):
        to = (level + 1) * k // steps + CLEAN
        told = to.clamp(min=0)
        eps = _first_noise(denoiser(x, schedule.time(told), cond), x, at, told, schedule)
        total, following = eps, _forward(schedule, x, at, to, eps)
        for count in range(2, corrections + 2):
            pred = denoiser(following, schedule.time(told), cond)
            found = schedule.noise_of(pred, following, told)
            total = total + found
            eps = total / count if average else found
            following = _forward(schedule, x, at, to, eps)
        if eta:
            sigma = schedule.step_sigma(to, at, eta=eta)
            following = draw(following, torch.where(at == to, 0.0, sigma), generator)
        x, at = following, to
    return x


def _first_noise(pred: Tensor, x: Tensor, at: Tensor, told: Tensor, schedule: Schedule) -> Tensor:
    """The noise that the prediction says is in x, which is less noisy than the denoiser is told. A
    prediction of the clean sample says it by the level told: x itself may have none."""
    return schedule.noise_of(pred, x, told if schedule.prediction == "x0" else at)


def _forward(schedule: Schedule, x: Tensor, at: Tensor, to: Tensor, eps: Tensor) -> Tensor:
    """x at `at` carried to `to` by the given noise; where they are equal x itself, bit by bit."""
    shape = (-1, *[1] * (x.dim() - 1))
    (signal, noise), (signal_to, noise_to) = (schedule.coefficients(level) for level in (at, to))
    kept = (signal_to / signal).reshape(shape)
    added = (noise_to - signal_to / signal * noise).reshape(shape)
    moved = (kept.to(eps.dtype) * x + added.to(eps.dtype) * eps).to(x.dtype)
    return torch.where((at == to).reshape(shape), x, moved)
