"""Diffusion preference losses on stored data, on points of the plane, in seconds on a CPU.

    python examples/diffusion_points.py [loss ...]

A tiny denoiser learns two modes, left and right; each loss then teaches it that right is better.
Printed is the share of samples near the right mode, before and after.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from prefkern import LOSSES
from prefkern import diffusion as d

SCHEDULE, PAIRS = d.Schedule.linear(100, 1e-3, 0.2), 64
MODES = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])  # right, left
AXES = {"beta": 20.0, "segments": torch.arange(2), "num_segments": 2}  # one segment per coordinate
LADDER = d.ladder(SCHEDULE, 20)


class Denoiser(nn.Module):
    """denoiser(x [B, 2], time [B], cond) -> noise [B, 2]; cond: caption [B, 1], user [B, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(12, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        angles = time[:, None] / len(SCHEDULE) * torch.tensor([1.0, 2.0, 4.0, 8.0])
        parts = [x, angles.sin(), angles.cos(), cond["caption"], cond["user"]]
        return self.layers(torch.cat(parts, 1))


def points(mode: Tensor) -> Tensor:  # [B] 0 right, 1 left -> [B, 2]
    return MODES[mode] + 0.3 * torch.randn(len(mode), 2)


def said(count: int, caption: float = 0.0, user: float = 0.0) -> dict[str, Tensor]:
    return {"caption": torch.full((count, 1), caption), "user": torch.full((count, 1), user)}


def pretrained(steps: int = 800) -> Denoiser:
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        clean = points(torch.randint(2, (256,)))
        level, noise = torch.randint(len(SCHEDULE), (256,)), torch.randn(256, 2)
        pred = model(SCHEDULE.add_noise(clean, noise, level), level, said(256))
        optimizer.zero_grad()
        (pred - noise).square().mean().backward()
        optimizer.step()
        rate.step()
    return model


def share(model: d.Denoiser, user: float = 0.0) -> float:
    """Of samples, those within 1 of the right mode (a user of -1: of the left)."""
    x = d.sample(model, torch.randn(512, 2), said(512, user=user), SCHEDULE, LADDER)
    return ((x - MODES[int(user < 0)]).norm(dim=1) < 1.0).float().mean().item()


# ---- what each method trains on: functions of the policy as it is --------------------------------

Batches = Callable[[nn.Module], Iterator[d.Pairs | d.Ranked | d.Single]]
Method = tuple[dict[str, object], Batches]
RIGHT, LEFT = torch.zeros(PAIRS, dtype=torch.long), torch.ones(PAIRS, dtype=torch.long)


def stored(**more: object) -> Batches:
    """Pairs of data; `more` are fields of the batch."""

    def batches(policy: nn.Module) -> Iterator[d.Pairs]:
        while True:
            yield d.Pairs(points(RIGHT), points(LEFT), said(PAIRS), **more)

    return batches


def of_users(policy: nn.Module) -> Iterator[d.Pairs]:
    """Half of the users prefer the other side."""
    while True:
        mode = torch.randint(2, (PAIRS,))
        cond = said(PAIRS) | {"user": 1.0 - 2.0 * mode[:, None]}
        yield d.Pairs(points(mode), points(1 - mode), cond)


def ranked(name: str) -> Batches:
    """Four points per group, the further right the better."""

    def batches(policy: nn.Module) -> Iterator[d.Ranked]:
        cu = torch.arange(0, 2 * PAIRS + 1, 4)
        while True:
            x = points(torch.randint(2, (2 * PAIRS,)))
            yield d.Ranked(x, cu, said(2 * PAIRS), inputs={name: d.win_share(x[:, :1], cu)})

    return batches


# loss -> (its arguments, what it trains on)
METHODS: dict[str, Method] = {
    "diff_dpo": ({"kappa": 20.0}, stored()),
    "diff_npo": ({"kappa": 20.0}, stored()),
    "diffusion_mapo": ({"T": 20.0, "beta_mapo": 1.0}, stored()),
    "inpo": ({"beta": 40.0}, stored()),
    "smpo": ({"beta": 40.0, "gamma": 4.0}, stored(inputs={"p_win": torch.full((PAIRS,), 0.7)})),
    "dcpo": ({"beta": 40.0}, stored(rejected_cond=said(PAIRS, caption=1.0))),
    "ppd": ({"beta": 40.0}, of_users),
    "rank_dpo": ({"beta": 20.0}, ranked("phi")),
    "lpo": ({"beta": 20.0}, ranked("relevance")),
    "dense_dpo": (AXES, stored(inputs={"labels": torch.tensor([[1.0, 0.0]]).expand(PAIRS, 2)})),
}


def tuned(base: nn.Module, loss: str, method: Method, steps: int = 60) -> nn.Module:
    """The base after `steps` steps of the method."""
    args, batches = method
    policy = copy.deepcopy(base)
    ref = copy.deepcopy(base) if LOSSES[loss].needs_reference else None
    model = d.DiffusionPreference(policy, SCHEDULE, loss, ref=ref, **args)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    for _, batch in zip(range(steps), batches(policy), strict=False):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    return policy


def results(base: nn.Module, loss: str) -> list[float]:
    """Shares before and after; of either user for ppd; guided by diff_npo's negative model."""
    users, steps = ((1.0, -1.0), 150) if loss == "ppd" else ((0.0,), 60)
    policy = tuned(base, loss, METHODS[loss], steps)
    after = d.Guided(base, policy, 2.0) if loss == "diff_npo" else policy
    return [share(model, user) for user in users for model in (base, after)]


if __name__ == "__main__":
    torch.manual_seed(0)
    start = pretrained()
    for name in sys.argv[1:] or METHODS:
        print(f"{name:15}", *(f"{value:.2f}" for value in results(start, name)))
