"""A denoiser and a diffusion loss as one module, for any loop: its forward returns the loss.

Whatever wraps it (DistributedDataParallel, FSDP2, Accelerate) sees the denoiser called inside the
wrapped forward, so gradients are synchronised as ever.

Shapes: B samples of a batch (both sides of its pairs), P pairs, S samples, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import losses
from ..losses.docstrings import meanings
from ..losses.inputs import missing
from ..ops.error_sum import ErrorSums, error_sum
from . import cond as conditions
from . import methods
from .batches import Batch, Pairs, Ranked
from .noised import Draw, Noised, Source, cat, source_of
from .reference import adapters_off, evaluating, has_adapters
from .schedule import Schedule
from .walk import Denoiser


class DiffusionOutput(NamedTuple):
    loss: Tensor  # scalar
    metrics: dict[str, Tensor]  # detached 0-d tensors


class DiffusionPreference(nn.Module):
    """forward(batch) -> (loss, metrics), for every loss over prediction errors of one denoiser.

    Its parameters and its state dict are the denoiser's, under `denoiser.`; the reference moves
    with it and is in neither. Levels and noise are drawn anew at every call, the same for both
    sides of a pair and within a group.

    Args:
        denoiser: A module `denoiser(x, time, cond)` -> prediction `[B, ...]`.
        schedule: Of its levels and kind of prediction; a diffusers scheduler is read with
            `Schedule.of`.
        loss: A name of `prefkern.LOSSES`, of the diffusion family. Default "diff_dpo".
        ref: The reference, called like the denoiser. Default None: the denoiser with its adapters
            off.
        source: Where noisy inputs come from: "forward" noise, "inverted" (DDIM), "renoised" (with
            one correction per step), or a function as in `diffusion.noised`. Default None, the
            method's.
        levels: Range of levels drawn from, the second excluded. Default None, all.
        segments: `[F]` segment of each entry of axis `segment_dim` of a sample, for losses that
            read errors per segment, with `num_segments`. Default None.
        segment_dim: As in `error_sum`. Default 1.
        reduction: As in `error_sum`. Default "mean".
        error: "err" for squared errors, or "huber:c". Default "err".
        **loss_args: The loss's own.

    Raises:
        ValueError: a loss of another family or an unknown argument, levels out of range, no
            reference where the loss reads one, an unknown source.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        schedule: Schedule,
        loss: losses.LossLike = "diff_dpo",
        *,
        ref: Denoiser | None = None,
        source: str | Source | None = None,
        levels: tuple[int, int] | None = None,
        segments: Tensor | None = None,
        num_segments: int | None = None,
        segment_dim: int = 1,
        reduction: str = "mean",
        error: str = "err",
        **loss_args: Any,
    ) -> None:
        super().__init__()
        self.record, own = losses.resolve(loss)
        if self.record.family != "diffusion":
            raise ValueError(
                f"loss {self.record.name!r} reads log-probabilities, not prediction errors; take "
                "one of the diffusion family (prefkern losses)."
            )
        if not isinstance(schedule, Schedule):
            schedule = Schedule.of(schedule)
        self._args = {**own, **loss_args}
        self._hyper = losses.bind(
            self.record, self._args, supplied=losses.required(self.record)
        ).hyper
        if self.record.needs_reference and ref is None and not has_adapters(denoiser):
            with adapters_off(denoiser):
                pass
        if ref is not None and not self.record.needs_reference:
            raise ValueError(f"loss {self.record.name!r} reads no reference; drop ref.")
        if error != "err" and self.record.needs_reference:
            raise ValueError(f"error {error!r} has no reference's error; use 'err'.")
        low, high = (0, len(schedule)) if levels is None else levels
        if not 0 <= low < high <= len(schedule):
            raise ValueError(
                f"levels must be a range within (0, {len(schedule)}), got {(low, high)}."
            )
        if (segments is None) != (num_segments is None):
            raise ValueError("num_segments comes with segments [F]; pass both or none.")
        name = self.record.name
        self.source = source_of(source or methods.SOURCE_OF.get(name, "forward"))
        self.denoiser, self.schedule = denoiser, schedule
        self.levels, self.error = (low, high), error
        self._segments = segments
        self._reduce: dict[str, Any] = {
            "num_segments": num_segments, "segment_dim": segment_dim, "reduction": reduction,
        }  # fmt: skip
        # in a tuple: no submodule, so neither saved nor wrapped with the policy
        self._ref = (ref,)
        if isinstance(ref, nn.Module):
            ref.requires_grad_(False).eval()

    def forward(self, batch: Batch, *, generator: torch.Generator | None = None) -> DiffusionOutput:
        """The mean loss of a batch.

        Args:
            batch: Pairs, Ranked or Single.
            generator: Of levels and noise. Default None, torch's own.

        Raises:
            ValueError: a batch that lacks what the loss reads or what makes it the method, shapes
                that do not fit, a prediction of another shape than the samples.
        """
        batch.check()
        methods.check(self.record.name, batch, self.source, self._segments is not None)
        self._check_form(batch)
        noised, cond = self.inputs(batch, generator)
        errors = self._named(batch, self.errors(noised, cond))
        values = self.record(*errors.values(), **self._loss_inputs(batch, noised))
        return DiffusionOutput(values.mean(), self._metrics(errors))

    def _check_form(self, batch: Batch) -> None:
        names = self.record.inputs.positional
        if ("chosen_err" in names) == isinstance(batch, Pairs):
            return
        right = "Pairs" if "chosen_err" in names else "Ranked or Single"
        raise ValueError(
            f"loss {self.record.name!r} reads a batch of {right}, got {type(batch).__name__}."
        )

    def inputs(self, batch: Batch, generator: torch.Generator | None = None) -> tuple[Noised, Any]:
        """The noisy samples of all sides, one after the other, and their conditions."""
        parts, owners = batch.parts(), batch.owners()
        clean = [side for side, *_ in parts if not isinstance(side, Noised)]
        known = [side.level for side, *_ in parts if isinstance(side, Noised)]
        level = noise = torch.empty(0)
        if clean:
            draws = len(batch.cu_groups) - 1 if isinstance(batch, Ranked) else len(owners)
            like: dict[str, Any] = {"device": clean[0].device, "generator": generator}
            low, high = self.levels
            level = known[0] if known else torch.randint(low, high, (draws,), **like)[owners]
            noise = torch.randn(draws, *clean[0].shape[1:], dtype=clean[0].dtype, **like)[owners]
        noisy = [
            side if isinstance(side, Noised) else self._from_source(side, cond, level, noise)
            for side, cond, _ in parts
        ]
        if len(parts) == 1:
            return noisy[0], parts[0][1]
        return cat(*noisy), conditions.joined(parts[0][1], parts[1][1])

    def _from_source(self, clean: Tensor, cond: Any, level: Tensor, noise: Tensor) -> Noised:
        reference = self._reference if self.record.needs_reference else None
        with evaluating(self.denoiser):
            return self.source(
                Draw(clean, cond, level, noise, self.schedule, self.denoiser, reference)
            )

    def errors(self, noised: Noised, cond: Any) -> ErrorSums:
        """Errors of the denoiser, and of the reference where the loss reads one: `[B]`, or
        `[B, num_segments]`."""
        ref = None
        if self.record.needs_reference:
            ref = self._read(noised, self._ask(self._reference, noised, cond))
        said = self._read(noised, self._ask(self.denoiser, noised, cond))
        stats = (self.error,) if ref is None else ("err", "ref_err")
        target = noised.target.to(said.dtype)
        segments = None if self._segments is None else self._segments.to(said.device)
        return error_sum(said, target, ref, stats=stats, segments=segments, **self._reduce)

    def _reference(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        """The reference's prediction, without gradient."""
        (ref,) = self._ref
        if ref is not None:
            with evaluating(ref):
                return ref(x, time, cond)
        with evaluating(self.denoiser), adapters_off(self.denoiser):
            return self.denoiser(x, time, cond)

    def _ask(self, denoiser: Denoiser, noised: Noised, cond: Any) -> Tensor:
        pred = denoiser(noised.x, self.schedule.time(noised.level), cond)
        if not isinstance(pred, Tensor) or pred.shape != noised.x.shape:
            got = list(pred.shape) if isinstance(pred, Tensor) else type(pred).__name__
            raise ValueError(
                f"denoiser(x, time, cond) must return a prediction of the shape of x, "
                f"{list(noised.x.shape)}, got {got}; a diffusers model's is out.sample."
            )
        return pred

    def _read(self, noised: Noised, pred: Tensor) -> Tensor:
        """What of a prediction is compared with the target."""
        if noised.reading == "clean":
            return self.schedule.clean(pred, noised.x, noised.level)
        if noised.reading == "mean":
            assert noised.to is not None and noised.sigma is not None
            return self.schedule.step_mean(pred, noised.x, noised.level, noised.to, noised.sigma)
        return pred.to(torch.promote_types(pred.dtype, noised.target.dtype))

    def _named(self, batch: Batch, sums: ErrorSums) -> dict[str, Tensor]:
        """The errors by the names under which the loss reads them."""
        (err,) = (x for x in (sums.err, sums.huber) if x is not None)
        found = {"err": err}
        if sums.ref_err is not None:
            found["ref_err"] = sums.ref_err
        if isinstance(batch, Pairs):
            for name in list(found):
                start = name.removesuffix("err")
                found[f"{start}chosen_err"], found[f"{start}rejected_err"] = found[name].chunk(2)
        return {name: found[name] for name in self.record.inputs.positional}

    def _loss_inputs(self, batch: Batch, noised: Noised) -> dict[str, Any]:
        """Keyword arguments of the loss: its own, the batch's, those that follow from it."""
        given = {**self._args, **batch.inputs}
        keywords = self.record.inputs.keywords
        if spare := [name for name in batch.inputs if name not in keywords]:
            raise ValueError(f"loss {self.record.name!r} takes no input {spare}; drop it.")
        if "sigma" in keywords and noised.sigma is not None:
            given["sigma"] = noised.sigma[: len(noised.sigma) // 2]
        if isinstance(batch, Ranked) and "cu_groups" in keywords:
            given["cu_groups"] = batch.cu_groups
        if lacking := [name for name in self.record.inputs.required if name not in given]:
            told = missing(lacking, meanings(self.record))
            raise ValueError(f"loss {self.record.name!r} {told} (inputs= of the batch)")
        return given

    @torch.no_grad()
    def _metrics(self, errors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean errors, and rewards where two sides are compared, one number per sample."""
        found = {name: value.detach().mean() for name, value in errors.items()}
        sides = [name for name in ("chosen_err", "rejected_err") if name in errors]
        if not sides or errors[sides[0]].dim() != 1:
            return found
        chosen, rejected = (
            self.record.rewards(errors[name].detach(), errors.get(f"ref_{name}"), **self._hyper)
            for name in sides
        )
        margin = chosen - rejected
        found |= {
            "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
            "rewards/margins": margin.mean(),
            "rewards/accuracies": (0.5 * (1.0 + margin.sign())).mean(),
        }  # fmt: skip
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffusionPreference:
        for ref in self._ref:
            if isinstance(ref, nn.Module):
                ref._apply(fn)
        return super()._apply(fn, recurse)
