"""How much signal and noise a level has, and what a prediction says there.

A schedule has T levels, 0 the least noisy, T - 1 the most; level -1 (CLEAN) is the sample itself:

    x_t = signal[t] x_0 + noise[t] eps

Shapes: T levels of a schedule, B samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks

CLEAN = -1
# What a denoiser predicts: noise, clean sample, velocity signal eps - noise x_0, or the velocity
# eps - x_0 of a rectified flow.
PREDICTIONS = ("eps", "x0", "v", "flow")
# The names of diffusers' config.prediction_type.
_OF_DIFFUSERS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


class Step(NamedTuple):
    """The Gaussian transition from a level to a less noisy one."""

    mean: Tensor  # [B, ...]
    sigma: Tensor  # [B] fp64, standard deviation per element


class Schedule:
    """Signal, noise and time of every level, and what is predicted.

    Args:
        signal: `[T]` factor of the clean sample, in [0, 1], falling.
        noise: `[T]` factor of the noise, in (0, 1], rising.
        prediction: "eps", "x0", "v" (signal eps - noise x_0) or "flow" (eps - x_0). Default "eps".
        times: `[T]` what the denoiser is told at a level. Default 0 ... T - 1.

    Raises:
        ValueError: levels that are not finite, not in order or not the kind's (signal^2 + noise^2
            = 1 for "v", signal + noise = 1 for "flow"); a level without signal for "eps", whose
            clean sample would be a division by zero.
    """

    def __init__(
        self,
        signal: Tensor | Sequence[float],
        noise: Tensor | Sequence[float],
        *,
        prediction: str = "eps",
        times: Tensor | Sequence[float] | None = None,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, got {prediction!r}.")
        kept = torch.as_tensor(signal, dtype=torch.float64, device="cpu")
        added = torch.as_tensor(noise, dtype=torch.float64, device="cpu")
        _check_table(kept, added, prediction)
        levels = len(kept)
        told = torch.arange(levels) if times is None else torch.as_tensor(times, device="cpu")
        if told.shape != (levels,):
            raise ValueError(f"times must be [T] = [{levels}], got {list(told.shape)}.")
        self.signal, self.noise, self.times, self.prediction = kept, added, told, prediction
        # index -1 finds the clean sample, which has no time
        rows = torch.stack([kept, added])
        clean = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        self._tables = {torch.device("cpu"): (torch.cat([rows, clean], 1), told)}

    def __len__(self) -> int:
        return len(self.signal)

    def __repr__(self) -> str:
        return f"Schedule({len(self)} levels, prediction={self.prediction!r})"

    # ---- schedules in use ------------------------------------------------------------------------

    @classmethod
    def variance_preserving(
        cls, alphas_cumprod: Tensor | Sequence[float], *, prediction: str = "eps"
    ) -> Schedule:
        """signal^2 = alphas_cumprod `[T]`, noise^2 = 1 - alphas_cumprod."""
        kept = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        return cls(kept.sqrt(), (1.0 - kept).sqrt(), prediction=prediction)

    @classmethod
    def linear(
        cls, levels: int = 1000, start: float = 1e-4, end: float = 0.02, *, prediction: str = "eps"
    ) -> Schedule:
        """DDPM (arXiv 2006.11239): the variance added per level rises linearly."""
        betas = torch.linspace(start, end, levels, dtype=torch.float64)
        return cls.variance_preserving(torch.cumprod(1.0 - betas, 0), prediction=prediction)

    @classmethod
    def scaled_linear(
        cls, levels: int = 1000, start: float = 0.00085, end: float = 0.012,
        *, prediction: str = "eps",
    ) -> Schedule:  # fmt: skip
        """Stable Diffusion: the root of that variance rises linearly."""
        betas = torch.linspace(start**0.5, end**0.5, levels, dtype=torch.float64) ** 2
        return cls.variance_preserving(torch.cumprod(1.0 - betas, 0), prediction=prediction)

    @classmethod
    def flow(cls, levels: int = 1000, *, shift: float = 1.0) -> Schedule:
        """Rectified flow: x_t = (1 - s) x_0 + s eps, target eps - x_0.

        s = shift u / (1 + (shift - 1) u) at u = 1 / T ... 1; the denoiser is told T s, as
        diffusers' FlowMatchEulerDiscreteScheduler does.

        Args:
            levels: T.
            shift: > 1 moves the levels towards noise (3 for Stable Diffusion 3). Default 1.
        """
        if not 0.0 < shift < math.inf:
            raise ValueError(f"shift must be a finite number > 0, got {shift}.")
        u = torch.arange(1, levels + 1, dtype=torch.float64) / levels
        s = shift * u / (1.0 + (shift - 1.0) * u)
        return cls(1.0 - s, s, prediction="flow", times=(levels * s).float())

    @classmethod
    def of(cls, scheduler: Any) -> Schedule:
        """The training schedule of a diffusers scheduler.

        Reads `alphas_cumprod` and `config.prediction_type` (DDPM, DDIM, DPM-Solver, Euler, ...), or
        of a flow-matching scheduler `config.num_train_timesteps` and `config.shift`;
        `set_timesteps` on it changes nothing here.

        Raises:
            ValueError: a scheduler that has neither, a shift that depends on the resolution, and
                what Schedule refuses.
        """
        config = getattr(scheduler, "config", None)
        name = type(scheduler).__name__
        if config is None:
            raise ValueError(f"scheduler must have a config as diffusers' have, got {name}.")
        if getattr(scheduler, "alphas_cumprod", None) is not None:
            kind = _OF_DIFFUSERS.get(config.prediction_type)
            if kind is None:
                raise ValueError(
                    f"prediction_type of {name} must be one of {tuple(_OF_DIFFUSERS)}, got "
                    f"{config.prediction_type!r}; build a Schedule by hand."
                )
            return cls.variance_preserving(scheduler.alphas_cumprod, prediction=kind)
        if "FlowMatch" not in name:
            raise ValueError(
                f"{name} has neither alphas_cumprod nor a rectified flow; build a Schedule from "
                "its signal and noise."
            )
        if getattr(config, "use_dynamic_shifting", False):
            raise ValueError(
                f"the levels of this {name} depend on the resolution (use_dynamic_shifting); use "
                "Schedule.flow(levels, shift=...) with the shift of your images."
            )
        return cls.flow(config.num_train_timesteps, shift=config.shift)

    # ---- numbers of a level ----------------------------------------------------------------------

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            table, times = self._tables[torch.device("cpu")]
            self._tables[device] = (table.to(device), times.to(device))
        return self._tables[device]

    def check_level(self, level: Tensor, *, lowest: int = 0, name: str = "level") -> Tensor:
        """`[B]` integers in [lowest, T). On a GPU values are not read: others give NaN.

        Raises:
            ValueError: another shape or dtype, and on a CPU values out of range.
        """
        checks.check_tensor(name, level)
        if level.dim() != 1 or level.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{name} must be [B] integers, one level per sample, got {level.dtype} "
                f"{checks.shape_text(level)}; expand one number with torch.full((B,), level)."
            )
        if level.device.type == "cpu" and not torch.compiler.is_compiling() and level.numel():
            low, high = int(level.min()), int(level.max())
            if low < lowest or high >= len(self):
                raise ValueError(
                    f"{name} must be in [{lowest}, {len(self)}), got {low} ... {high}; levels are "
                    "indices into the schedule, not the times that the denoiser is told."
                )
        return level

    def coefficients(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """signal and noise `[B]` fp64 of levels in [-1, T), -1 being the clean sample."""
        self.check_level(level, lowest=CLEAN)
        table, _ = self._table(level.device)
        found = table[:, level.clamp(CLEAN, len(self) - 1).long()]
        outside = (level < CLEAN) | (level >= len(self))
        signal, noise = torch.where(outside, torch.nan, found)
        return signal, noise

    def time(self, level: Tensor) -> Tensor:  # [B] -> [B]
        """What the denoiser is told at levels in [0, T); NaN or -1 outside, on a GPU."""
        self.check_level(level)
        _, times = self._table(level.device)
        found = times[level.clamp(0, len(self) - 1).long()]
        outside = (level < 0) | (level >= len(self))
        return torch.where(outside, torch.nan if times.is_floating_point() else -1, found)

    # ---- samples, noise and predictions ----------------------------------------------------------

    def add_noise(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """x_t = signal x_0 + noise eps, in the dtype of `clean`."""
        _same("noise", noise, clean)
        signal, amount = self._at(level, clean)
        return (signal * clean + amount * noise).to(clean.dtype)

    def target(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What a denoiser should predict for x_0 and eps at a level, in the dtype of `clean`."""
        _same("noise", noise, clean)
        if self.prediction == "eps":
            return noise.to(clean.dtype)
        if self.prediction == "x0":
            return clean
        if self.prediction == "flow":
            return (noise - clean).to(clean.dtype)
        signal, amount = self._at(level, clean)
        return (signal * noise - amount * clean).to(clean.dtype)

    def clean(self, pred: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """Tweedie's estimate of x_0 from a prediction at x_t; at least fp32."""
        _same("pred", pred, x)
        signal, amount = self._at(level, x)
        if self.prediction == "eps":
            return (x - amount * pred) / signal
        if self.prediction == "x0":
            return pred.to(signal.dtype)
        if self.prediction == "flow":
            return x - amount * pred
        return signal * x - amount * pred

    def noise_of(self, pred: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """The noise that a prediction at x_t says is in it; at least fp32."""
        _same("pred", pred, x)
        signal, amount = self._at(level, x)
        if self.prediction == "eps":
            return pred.to(signal.dtype)
        if self.prediction == "x0":
            return (x - signal * pred) / amount
        if self.prediction == "flow":
            return x + signal * pred
        return signal * pred + amount * x

    def step(self, pred: Tensor, x: Tensor, level: Tensor, to: Tensor, *, eta: float = 0.0) -> Step:
        """DDIM's transition to a less noisy level (arXiv 2010.02502 eq. 12, 16).

        mean = signal' x_0 + sqrt(noise'^2 - sigma^2) eps,
        sigma = eta noise' / noise sqrt(noise^2 - (signal / signal')^2 noise'^2)

        with x_0 and eps as the prediction says. eta = 0 is DDIM (for a flow the Euler step), 1 the
        ancestral sampler. `to` may be -1, where sigma is 0.

        Raises:
            ValueError: eta outside [0, 1], `to` above `level`.
        """
        sigma = self.step_sigma(level, to, eta=eta)
        return Step(self.step_mean(pred, x, level, to, sigma), sigma)

    def step_mean(
        self, pred: Tensor, x: Tensor, level: Tensor, to: Tensor, sigma: Tensor
    ) -> Tensor:
        """The mean of `step` for a known sigma `[B]`; at least fp32."""
        signal, amount = self._at(to, x)
        rest = (amount.double() ** 2 - _beside(sigma, x) ** 2).clamp(min=0.0).sqrt()
        found = self.noise_of(pred, x, level)
        return signal * self.clean(pred, x, level) + rest.to(found.dtype) * found

    def step_sigma(self, level: Tensor, to: Tensor, *, eta: float = 0.0) -> Tensor:  # [B] fp64
        """The standard deviation of `step`."""
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must be in [0, 1], got {eta}.")
        _below(to, level)
        (signal, amount), (signal_to, amount_to) = self.coefficients(level), self.coefficients(to)
        kept = torch.where(level == to, 1.0, signal / signal_to)
        added = amount**2 - kept**2 * amount_to**2
        return eta * amount_to / amount.clamp(min=1e-300) * added.clamp(min=0.0).sqrt()

    def renoise(self, x: Tensor, level: Tensor, to: Tensor, noise: Tensor) -> Tensor:
        """x at a level, carried to a noisier one by the forward process.

        x_s = (signal_s / signal_t) x_t + sqrt(noise_s^2 - (signal_s / signal_t)^2 noise_t^2) eps

        Raises:
            ValueError: `to` below `level`.
        """
        _same("noise", noise, x)
        _below(level, to, "level", "to")
        signal, amount = self._at(level, x, torch.float64)
        signal_to, amount_to = self._at(to, x, torch.float64)
        kept = torch.where(_beside(level == to, x), 1.0, signal_to / signal)
        added = (amount_to**2 - kept**2 * amount**2).clamp(min=0.0).sqrt()
        wide = _wide(x)
        return (kept.to(wide) * x + added.to(wide) * noise).to(x.dtype)

    def _at(
        self, level: Tensor, x: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """signal and noise `[B, 1, ...]` in at least fp32."""
        checks.check_float("samples", x)
        if x.dim() < 2 or len(level) != x.shape[0]:
            raise ValueError(
                f"samples must be [B, ...] with one level each, got samples "
                f"{checks.shape_text(x)} and {len(level)} levels."
            )
        signal, noise = self.coefficients(level)
        dtype = dtype or _wide(x)
        return _beside(signal, x).to(dtype), _beside(noise, x).to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _beside(value: Tensor, x: Tensor) -> Tensor:
    """`[B]` as `[B, 1, ...]`, to be multiplied with samples."""
    return value.reshape(-1, *[1] * (x.dim() - 1))


def _same(name: str, value: Tensor, like: Tensor) -> None:
    checks.check_float(name, value)
    if value.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of the samples, {checks.shape_text(like)}, got "
            f"{checks.shape_text(value)}."
        )


def _below(low: Tensor, high: Tensor, low_name: str = "to", high_name: str = "level") -> None:
    """Refuses a step in the wrong direction. Reads values: CPU tensors only."""
    if low.shape != high.shape:
        raise ValueError(
            f"{low_name} and {high_name} must both be [B], got {list(low.shape)} and "
            f"{list(high.shape)}."
        )
    if low.device.type == "cpu" and not torch.compiler.is_compiling() and bool((low > high).any()):
        raise ValueError(
            f"{low_name} must not be noisier than {high_name}, got {low.tolist()} and "
            f"{high.tolist()}."
        )


def _check_table(signal: Tensor, noise: Tensor, prediction: str) -> None:
    if signal.dim() != 1 or signal.shape != noise.shape or not signal.numel():
        raise ValueError(
            f"signal and noise must be [T] with at least one level, got {list(signal.shape)} and "
            f"{list(noise.shape)}."
        )
    if not bool((signal.isfinite() & noise.isfinite() & (signal >= 0) & (noise > 0)).all()):
        raise ValueError("signal must be finite and >= 0, noise finite and > 0, at every level.")
    ratio = signal / noise
    if bool((ratio[1:] > ratio[:-1]).any()):
        raise ValueError(
            "levels must go from little noise to much (signal / noise falling); flip the tables."
        )
    off = {"v": signal**2 + noise**2, "flow": signal + noise}.get(prediction)
    if off is not None and bool(((off - 1.0).abs() > 1e-5).any()):
        rule = "signal^2 + noise^2 = 1" if prediction == "v" else "signal + noise = 1"
        raise ValueError(f"prediction {prediction!r} needs {rule} at every level.")
    if prediction == "eps" and float(signal.min()) == 0.0:
        raise ValueError(
            "prediction 'eps' cannot have a level without signal (zero terminal SNR): the noise "
            "there says nothing of the clean sample, which would be a division by zero; use "
            "prediction 'v' or 'x0', or end the schedule one level earlier."
        )
