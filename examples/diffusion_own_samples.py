"""Diffusion losses on the policy's own samples, on the points of diffusion_points.py.

    python examples/diffusion_own_samples.py [loss ...]

Negatives from a copy of the policy, whole walks judged where they end, branches of single steps
judged while noisy, and walks cut short for a negative model; printed is the share of samples near
the right mode, before and after.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import torch
from diffusion_points import (
    LADDER,
    METHODS,
    MODES,
    PAIRS,
    RIGHT,
    SCHEDULE,
    Method,
    points,
    pretrained,
    said,
    share,
    tuned,
)
from torch import Tensor, nn

from prefkern import diffusion as d


def negative(policy: nn.Module) -> Iterator[d.Pairs]:
    """Right against the policy's own samples, from a copy renewed every 16 steps."""
    for step in range(10**6):
        if step % 16 == 0:
            frozen = copy.deepcopy(policy)
        own = d.own_noised(frozen, torch.randn(PAIRS, 2), said(PAIRS), SCHEDULE)
        yield d.Pairs(points(RIGHT), own, said(PAIRS))


def trajectories(policy: nn.Module) -> Iterator[d.Pairs]:
    """Two walks from one noise, judged where they end."""
    while True:
        one, two = (
            list(d.walk(policy, torch.randn(PAIRS, 2), said(PAIRS), SCHEDULE, LADDER, eta=1.0))
            for _ in range(2)
        )
        verdict = (one[-1].next[:, 0].sign() - two[-1].next[:, 0].sign()) / 2
        yield from d.step_pairs(one, two, said(PAIRS), verdict)


def branched(policy: nn.Module) -> Iterator[d.Pairs]:
    while True:
        noise = torch.randn(PAIRS, 2)
        yield from d.branches(policy, noise, said(PAIRS), SCHEDULE, nearness)


def nearness(x: Tensor, level: Tensor, cond: object) -> Tensor:
    """A step-aware preference model: how near a noisy point is to the right mode as noisy."""
    signal, _ = SCHEDULE.coefficients(level)
    return -10.0 * (x - signal[:, None] * MODES[0]).norm(dim=1)


def shortened(policy: nn.Module) -> Iterator[d.Single]:
    """Walks of the model as it was, cut short."""
    base = copy.deepcopy(policy)
    while True:
        yield d.Single(d.truncated(base, torch.randn(PAIRS, 2), said(PAIRS), SCHEDULE), said(PAIRS))


OWN: dict[str, Method] = {
    "dro": ({"margin": 0.5}, negative),
    "d3po": ({"beta": 5.0, "eps": 0.9}, trajectories),
    "spo_step": ({"beta": 10.0}, branched),
    "self_npo": ({}, shortened),
}


def results(base: nn.Module, loss: str) -> list[float]:
    """Shares before and after. self_npo trains a negative model, from which a model that
    Diffusion-DPO has begun to teach is guided away."""
    after = tuned(base, loss, OWN[loss])
    if loss != "self_npo":
        return [share(base), share(after)]
    begun = tuned(base, "diff_dpo", METHODS["diff_dpo"], 10)
    return [share(begun), share(d.Guided(begun, after, 2.0))]


if __name__ == "__main__":
    torch.manual_seed(0)
    start = pretrained()
    for name in sys.argv[1:] or OWN:
        print(f"{name:15}", *(f"{value:.2f}" for value in results(start, name)))
