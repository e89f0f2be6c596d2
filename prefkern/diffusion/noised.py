"""What a denoiser is shown in training and what it should have said, and where that comes from.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inversion import invert
from .schedule import Schedule
from .walk import Denoiser

READINGS = ("prediction", "clean", "mean")


@dataclass(frozen=True)
class Noised:
    """Noisy samples and the target of an error.

    `reading` says what of the denoiser's answer the target is compared with: its "prediction", the
    "clean" sample that it means, or the "mean" of the transition to the level `to` (`sigma` is that
    transition's).
    """

    x: Tensor  # [B, ...]
    level: Tensor  # [B]
    target: Tensor  # [B, ...]
    reading: str = "prediction"
    to: Tensor | None = None  # [B]
    sigma: Tensor | None = None  # [B]

    def index(self, rows: Tensor) -> Noised:
        """The samples at `rows`, integers or bool `[B]`."""
        return Noised(
            self.x[rows],
            self.level[rows],
            self.target[rows],
            self.reading,
            None if self.to is None else self.to[rows],
            None if self.sigma is None else self.sigma[rows],
        )

    def check(self, name: str) -> None:
        """Refuses fields that do not belong together.

        Raises:
            ValueError: shapes that differ, an unknown reading, a mean without its transition.
        """
        if self.reading not in READINGS:
            raise ValueError(f"reading of {name} must be one of {READINGS}, got {self.reading!r}.")
        if self.x.shape != self.target.shape or self.level.shape != self.x.shape[:1]:
            raise ValueError(
                f"{name} must have x and target [B, ...] and level [B], got {list(self.x.shape)}, "
                f"{list(self.target.shape)} and {list(self.level.shape)}."
            )
        if self.reading == "mean" and (self.to is None or self.sigma is None):
            raise ValueError(
                f"{name} reads the mean of a transition and needs to [B] and sigma [B]."
            )


def cat(first: Noised, second: Noised) -> Noised:
    """The samples of both, one after the other.

    Raises:
        ValueError: different readings.
    """
    if first.reading != second.reading:
        raise ValueError(
            f"both sides must have one reading, got {first.reading!r} and {second.reading!r}."
        )
    return Noised(
        torch.cat([first.x, second.x]),
        torch.cat([first.level, second.level]),
        torch.cat([first.target, second.target]),
        first.reading,
        _both(first.to, second.to),
        _both(first.sigma, second.sigma),
    )


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


class Draw(NamedTuple):
    """What a source makes noisy samples of; the denoisers are called without gradient."""

    clean: Tensor  # [B, ...]
    cond: Any
    level: Tensor  # [B]
    noise: Tensor  # [B, ...]
    schedule: Schedule
    policy: Denoiser
    reference: Denoiser | None


Source = Callable[[Draw], Noised]


def forward(draw: Draw) -> Noised:
    """The forward process: fresh noise on the samples."""
    x = draw.schedule.add_noise(draw.clean, draw.noise, draw.level)
    target = draw.schedule.target(draw.clean, draw.noise, draw.level)
    return Noised(x, draw.level, target)


@dataclass(frozen=True)
class Inverted:
    """Inputs from DDIM inversion of the samples: the target follows from x_t and x_0.

    eps = (x_t - signal x_0) / noise, turned into the schedule's kind of prediction

    Args:
        steps: Of the inversion. Default 10.
        corrections: 0 for DDIM-InPO, 1 for SmPO-Diffusion. Default 0.
        average: As in `invert`. Default True.
        eta: As in `invert`. Default 0.
        by: Who inverts, "reference" or "policy". Both released codes take the policy as it is; its
            errors then feed on themselves and can blow up at a high learning rate. Default
            "reference".

    Raises:
        ValueError: `by` is neither, or the loss reads no reference.
    """

    steps: int = 10
    corrections: int = 0
    average: bool = True
    eta: float = 0.0
    by: str = "reference"

    def __post_init__(self) -> None:
        if self.by not in ("reference", "policy"):
            raise ValueError(f'by must be "reference" or "policy", got {self.by!r}.')

    def __call__(self, draw: Draw) -> Noised:
        clean, level, schedule = draw.clean, draw.level, draw.schedule
        denoiser = draw.policy if self.by == "policy" else draw.reference
        if denoiser is None:
            raise ValueError('there is no reference to invert with; use Inverted(by="policy").')
        x = invert(
            denoiser, clean, draw.cond, schedule, level, steps=self.steps,
            corrections=self.corrections, average=self.average, eta=self.eta,
        )  # fmt: skip
        wide = torch.promote_types(clean.dtype, torch.float32)
        shape = (-1, *[1] * (clean.dim() - 1))
        signal, amount = (c.to(wide).reshape(shape) for c in schedule.coefficients(level))
        eps = (x - signal * clean) / amount
        return Noised(x, level, schedule.target(clean.to(wide), eps, level))


SOURCES: dict[str, Source] = {
    "forward": forward,
    "inverted": Inverted(),
    "renoised": Inverted(corrections=1),
}


def source_of(source: str | Source) -> Source:
    """The source of that name, or the function itself.

    Raises:
        ValueError: an unknown name.
    """
    if callable(source):
        return source
    if source not in SOURCES:
        raise ValueError(f"source must be one of {tuple(SOURCES)} or a function, got {source!r}.")
    return SOURCES[source]
