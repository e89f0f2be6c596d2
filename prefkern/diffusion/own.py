"""Training inputs from the policy's own walks: negatives, compared trajectories, branches, cuts.

Shapes: B samples, K candidates of a step, n steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cond as conditions
from .batches import Pairs
from .noised import Noised, cat
from .schedule import Schedule
from .walk import Denoiser, Transition, draw, ladder, walk

# scorer(x [B, ...], level [B], cond) -> [B], higher is better; x is at that level
Scorer = Callable[[Tensor, Tensor, Any], Tensor]


def own_noised(
    denoiser: Denoiser,
    noise: Tensor,  # [B, ...]
    cond: Any,
    schedule: Schedule,
    *,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> Noised:
    """A policy's own walk as the rejected side (Diffusion-DRO, arXiv 2510.18353): of each sample
    one random step, whose target is what the policy itself predicted there.

    The policy that walks is a copy that stands still for some steps (16 in the authors' code):
    measured against its own prediction of this moment, an error has no slope.
    """
    taken = list(walk(denoiser, noise, cond, schedule, ladder(schedule, steps)))
    return _at_random(taken, [step.pred for step in taken], generator)


def truncated(
    denoiser: Denoiser,
    noise: Tensor,  # [B, ...]
    cond: Any,
    schedule: Schedule,
    *,
    steps: int = 10,
    generator: torch.Generator | None = None,
) -> Noised:
    """Samples cut short (Self-NPO, arXiv 2505.11777): a walk stops at a random step t, its estimate
    of the clean sample is the target, and x_t is carried on to a random noisier level s.

    x_s = (signal_s / signal_t) x_t + sqrt(noise_s^2 - (signal_s / signal_t)^2 noise_t^2) eps
    """
    taken = list(walk(denoiser, noise, cond, schedule, ladder(schedule, steps)))
    estimates = [schedule.clean(step.pred, step.x, step.level).to(noise.dtype) for step in taken]
    # not the first step: there is no noisier level than its own
    cut = _at_random(taken[1:] or taken, estimates[1:] or estimates, generator)
    share = torch.rand(len(noise), generator=generator, device=noise.device)
    room = len(schedule) - cut.level
    level = cut.level + (share * room).long().clamp(max=room - 1)
    fresh = torch.randn(noise.shape, generator=generator, device=noise.device, dtype=noise.dtype)
    return Noised(schedule.renoise(cut.x, cut.level, level, fresh), level, cut.target, "clean")


def _at_random(
    taken: Sequence[Transition], targets: Sequence[Tensor], generator: torch.Generator | None
) -> Noised:
    """Of each sample one of its steps."""
    x, level, target = (torch.stack(list(values)) for values in
                        ((s.x for s in taken), (s.level for s in taken), targets))  # fmt: skip
    count = x.shape[1]
    chosen = torch.randint(len(taken), (count,), generator=generator, device=x.device)
    every = torch.arange(count, device=x.device)
    return Noised(x[chosen, every], level[chosen, every], target[chosen, every])


def step_pairs(
    first: Sequence[Transition],
    second: Sequence[Transition],
    cond: Any,
    preferred: Tensor,  # [B]
) -> list[Pairs]:
    """D3PO's pairs (arXiv 2311.13231): every step of two walks of one prompt, under the one verdict
    on where they ended.

    Args:
        first, second: Walks with eta > 0, of the same levels.
        preferred: `[B]` +1 where the first sample is better, -1 the second, 0 a tie.

    Raises:
        ValueError: walks of different levels, deterministic ones.
    """
    if len(first) != len(second) or any(
        not torch.equal(a.level, b.level) for a, b in zip(first, second, strict=True)
    ):
        raise ValueError(
            f"both walks must have the same levels, got {[int(s.level[0]) for s in first]} and "
            f"{[int(s.level[0]) for s in second]} (of the first sample)."
        )
    found = []
    for a, b in zip(first, second, strict=True):
        if bool((a.sigma > 0).all()):
            both = cat(as_step(a), as_step(b))
            every = torch.arange(len(a.x), device=a.x.device)
            swapped = (preferred < 0) * len(every)
            better, worse = every + swapped, every + len(every) - swapped
            decided = {"h": preferred.abs().to(a.x.dtype)}
            found.append(Pairs(both.index(better), both.index(worse), cond, inputs=decided))
    if not found:
        raise ValueError("no step of the walks is random; sample them with eta > 0.")
    return found


def as_step(step: Transition, following: Tensor | None = None) -> Noised:
    """The transition as training input: its sample `following` (default the one taken) against the
    mean that the denoiser gives it."""
    target = step.next if following is None else following
    return Noised(step.x, step.level, target, "mean", step.to, step.sigma)


@torch.no_grad()
def branches(
    denoiser: Denoiser,
    noise: Tensor,  # [B, ...]
    cond: Any,
    schedule: Schedule,
    scorer: Scorer,
    *,
    steps: int = 20,
    first_step: int = 4,
    candidates: int = 4,
    threshold: float = 0.3,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[Pairs]:
    """SPO's pairs (arXiv 2406.04314): at every step K next samples from one x_t, the best against
    the worst under a scorer of noisy samples; the walk goes on from a random one of them.

    Args:
        scorer: `scorer(x, level, cond)` -> `[B]` scores of samples at `level`, higher is better.
        steps: Of the walk. Default 20.
        first_step: Steps before it make no pairs. Default 4.
        candidates: K >= 2. Default 4.
        threshold: A pair is kept where softmax over (best, worst) differs by more. Default 0.3.
        eta: Of the transitions, > 0. Default 1.

    Yields:
        Pairs of one step, with at least one pair; the last, deterministic step makes none.

    Raises:
        ValueError: fewer than two candidates, eta = 0, scores of another shape or not finite.
    """
    if candidates < 2 or not eta > 0.0:
        raise ValueError(f"branches need candidates >= 2 and eta > 0, got {candidates} and {eta}.")
    x, levels = noise, ladder(schedule, steps).to(noise.device)
    for k in range(steps):
        level, to = (levels[i].expand(len(x)) for i in (k, k + 1))
        pred = denoiser(x, schedule.time(level), cond)
        mean, sigma = schedule.step(pred, x, level, to, eta=eta)
        many = draw(mean.repeat_interleave(candidates, 0), sigma.repeat_interleave(candidates),
                    generator).to(x.dtype)  # fmt: skip
        table = many.unflatten(0, (len(x), candidates))
        every = torch.arange(len(x), device=x.device)
        if k >= first_step and k < steps - 1:
            scores = _scores(
                scorer, many, to.repeat_interleave(candidates),
                conditions.repeated(cond, candidates),
            ).unflatten(0, (-1, candidates))  # fmt: skip
            best, worst = scores.max(1), scores.min(1)
            # softmax(best) - softmax(worst) of the two
            kept = torch.tanh(0.5 * (best.values - worst.values)) > threshold
            if bool(kept.any()):
                at = Transition(x, level, pred, mean, sigma, x, to)
                chosen, rejected = (
                    as_step(at, table[every, i]).index(kept) for i in (best.indices, worst.indices)
                )
                yield Pairs(chosen, rejected, conditions.taken(cond, kept.nonzero()[:, 0]))
        picked = torch.randint(candidates, (len(x),), generator=generator, device=x.device)
        x = table[every, picked]


def _scores(scorer: Scorer, x: Tensor, level: Tensor, cond: Any) -> Tensor:
    scores = scorer(x, level, cond)
    if scores.shape != (len(x),) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"scorer must return [B] = [{len(x)}] finite numbers, got {list(scores.shape)}"
            f"{'' if scores.isfinite().all() else ' with numbers that are not finite'}."
        )
    return scores
