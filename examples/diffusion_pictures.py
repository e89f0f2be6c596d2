"""A tiny flow transformer on 8 x 8 pictures learns which halves people like, in seconds on a CPU.

    python examples/diffusion_pictures.py [loss ...]

A picture has a bright block in its upper and in its lower half, each left or right. Preferred is:
above left, below right. Printed is the share of samples that are so, before and after. dense_dpo
sees random pictures and a label for each half. Levels are the noisy ones, where the sides are
decided: below them both errors of a pair would only grow.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from prefkern import LOSSES
from prefkern import diffusion as d

SCHEDULE = d.Schedule.flow(100)
LADDER = d.ladder(SCHEDULE, 20)
PAIRS = 32
LIKED = torch.tensor([0, 1])  # above left, below right


class Transformer(nn.Module):
    """denoiser(x [B, 1, 8, 8], time [B], cond) -> velocity; there are no captions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.place = nn.Parameter(0.1 * torch.randn(16, width))
        self.told = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor, time: Tensor, cond: None = None) -> Tensor:
        angles = time[:, None] / len(SCHEDULE) * torch.tensor([1.0, 2.0, 4.0, 8.0])
        told = self.told(torch.cat([angles.sin(), angles.cos()], 1))
        tokens = self.patch(x).flatten(2).mT + self.place + told[:, None]  # [B, 16, width]
        for block in self.blocks:
            tokens = block(tokens)
        return nn.functional.pixel_shuffle(self.out(tokens).mT.unflatten(2, (4, 4)), 2)


def pictures(sides: Tensor) -> Tensor:  # [B, 2] 0 left, 1 right -> [B, 1, 8, 8]
    """Bright blocks on dark ground, above and below, with a little noise."""
    halves = torch.nn.functional.one_hot(sides, 2).float()  # [B, 2, 2]
    shown = halves.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    return 2.0 * shown - 1.0 + 0.1 * torch.randn(len(sides), 1, 8, 8)


def seen(x: Tensor) -> Tensor:  # [B, 1, 8, 8] -> [B, 2] 0 left, 1 right, -1 unclear
    """Where the bright blocks are; unclear where left and right differ by less than half."""
    means = x[:, 0].unflatten(1, (2, 4)).unflatten(3, (2, 4)).mean((2, 4))  # [B, 2, 2]
    gap = means[..., 1] - means[..., 0]
    return torch.where(gap.abs() > 1.0, (gap > 0).long(), -1)


def random_sides(count: int = PAIRS) -> Tensor:
    return torch.randint(2, (count, 2))


def pretrained(steps: int = 450, batch: int = 32) -> Transformer:
    model = Transformer()
    optimizer = torch.optim.Adam(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        clean = pictures(random_sides(batch))
        level, noise = torch.randint(len(SCHEDULE), (batch,)), torch.randn_like(clean)
        x = SCHEDULE.add_noise(clean, noise, level)
        loss = (model(x, SCHEDULE.time(level)) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model


def share(model: d.Denoiser, count: int = 256) -> float:
    """Of samples, those that are as liked."""
    found = seen(d.sample(model, torch.randn(count, 1, 8, 8), None, SCHEDULE, LADDER))
    return (found == LIKED).all(1).float().mean().item()


# ---- what each method trains on ------------------------------------------------------------------


def pairs() -> Iterator[d.Pairs]:
    while True:
        liked = LIKED.expand(PAIRS, 2)
        yield d.Pairs(pictures(liked), pictures(1 - liked))


def halves() -> Iterator[d.Pairs]:
    """Random pictures; each half has a label: +1 the first is better, -1 the second, 0 a tie."""
    while True:
        first, second = random_sides(), random_sides()
        labels = (first == LIKED).float() - (second == LIKED).float()
        yield d.Pairs(pictures(first), pictures(second), inputs={"labels": labels})


def ranked() -> Iterator[d.Ranked]:
    """Four pictures per group, better the more of their halves are liked."""
    while True:
        sides = random_sides(2 * PAIRS)
        good = {"relevance": (sides == LIKED).sum(1).float()}
        cu = torch.arange(0, 2 * PAIRS + 1, 4)
        yield d.Ranked(pictures(sides), cu, inputs=good)


ROWS = torch.arange(8) // 4
HALVES = {"segments": ROWS, "num_segments": 2, "segment_dim": 2}
METHODS: dict[str, tuple[dict[str, object], Callable[[], Iterator[d.Pairs | d.Ranked]]]] = {
    "diff_dpo": ({"kappa": 100.0}, pairs),
    "diffusion_mapo": ({"T": 40.0, "beta_mapo": 1.0}, pairs),
    "dense_dpo": ({"beta": 100.0, **HALVES}, halves),
    "lpo": ({"beta": 100.0}, ranked),
}


def tuned(base: nn.Module, loss: str, steps: int = 60) -> nn.Module:
    args, batches = METHODS[loss]
    policy = copy.deepcopy(base)
    ref = copy.deepcopy(base) if LOSSES[loss].needs_reference else None
    model = d.DiffusionPreference(policy, SCHEDULE, loss, ref=ref, levels=(60, 100), **args)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for _, batch in zip(range(steps), batches(), strict=False):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    return policy


if __name__ == "__main__":
    torch.manual_seed(0)
    start = pretrained()
    for name in sys.argv[1:] or METHODS:
        print(f"{name:15} {share(start):.2f} {share(tuned(start, name)):.2f}")
