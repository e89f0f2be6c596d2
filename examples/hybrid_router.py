"""Hybrid Preferences' router (arXiv 2410.19133): which pairs go to people, which to a model.

    python examples/hybrid_router.py

Every pair has a label of people, one of a model, and tags. Reward models are trained on random
mixes of the two labels; a regression tells their accuracy from how many pairs of each tag went to
people. Its coefficients are the gain of one more such pair, so the pairs of highest gain go to
people until the budget is spent. Here the model's judge is biased on two tags and people are
careless on two others, which the router is not told.

M pairs, T tags, D features of a pair of answers, R mixes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefkern.losses import bradley_terry

TAGS = ("safety", "reasoning", "chat", "code", "long", "dull")
BIASED, CARELESS = slice(0, 2), slice(4, 6)  # of the model, of people
DIMS = 4


class Pairs(NamedTuple):
    tags: Tensor  # [M, T] 0 or 1
    features: Tensor  # [M, D], of the first answer less those of the second
    truth: Tensor  # [M] bool: the first answer is better
    people: Tensor  # [M] bool, their label
    model: Tensor  # [M] bool, its label


def pairs(count: int, seed: int) -> Pairs:
    draw = torch.Generator().manual_seed(seed)
    tags = torch.nn.functional.one_hot(torch.randint(len(TAGS), (count,), generator=draw), 6)
    tags = (tags + (torch.rand(count, len(TAGS), generator=draw) < 0.1)).clamp(max=1).float()
    answers = torch.randn(count, DIMS, generator=draw)
    truth = answers.sum(1) > 0
    biased = tags[:, BIASED].any(1)
    model = torch.where(biased, answers[:, 0] - answers[:, 1] > 0, truth)
    careless = tags[:, CARELESS].any(1) & (torch.rand(count, generator=draw) < 0.45)
    features = (tags[:, :, None] * answers[:, None]).flatten(1)  # what counts may differ by tag
    return Pairs(tags, features, truth, truth ^ careless, model)


def reward_accuracy(data: Pairs, to_people: Tensor, test: Pairs) -> float:
    """Accuracy of a linear reward model that was trained on the mix; to_people [M] bool."""
    first = torch.where(to_people, data.people, data.model)
    relevance = torch.stack([first, ~first], 1).float().flatten()
    cu_groups = torch.arange(0, len(relevance) + 1, 2, dtype=torch.int32)
    weight = torch.zeros(data.features.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for _ in range(30):
        scores = torch.stack([data.features, -data.features], 1).flatten(0, 1) @ weight / 2
        loss = bradley_terry(scores, relevance, cu_groups).mean() + 0.01 * weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (test.features @ weight.detach() > 0) == test.truth
    return right.double().mean().item()


def random_mix(data: Pairs, draw: torch.Generator) -> Tensor:  # [M] bool
    """Some tags go to people more often than others, so that their counts vary apart."""
    share = torch.rand(len(TAGS), generator=draw)
    chance = (data.tags * share).sum(1) / data.tags.sum(1)
    return torch.rand(len(chance), generator=draw) < chance


def counts(data: Pairs, to_people: Tensor) -> Tensor:  # [T]
    return data.tags[to_people].sum(0).double()


class Predictor(NamedTuple):
    """accuracy = start + counts . gains"""

    start: float
    gains: Tensor  # [T] per pair

    def __call__(self, found: Tensor) -> Tensor:  # [..., T] -> [...]
        return self.start + found @ self.gains


def fit_predictor(found: Tensor, accuracy: Tensor) -> Predictor:
    """Least squares; found [R, T], accuracy [R]."""
    if len(found) <= found.shape[1]:
        raise ValueError(f"needs more mixes than tags, got {len(found)} for {found.shape[1]}.")
    inputs = torch.cat([torch.ones(len(found), 1).double(), found], 1)
    solved = torch.linalg.lstsq(inputs, accuracy[:, None]).solution[:, 0]
    return Predictor(solved[0].item(), solved[1:])


def route(data: Pairs, predictor: Predictor, budget: int) -> Tensor:  # [M] bool
    """The pairs of highest positive gain, `budget` of them at most."""
    gain = data.tags.double() @ predictor.gains
    chosen = torch.zeros(len(gain), dtype=torch.bool)
    chosen[gain.topk(budget).indices] = True
    return chosen & (gain > 0)


def main(size: int = 600, mixes: int = 60) -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    data, test = pairs(size, seed=1), pairs(2000, seed=2)
    tried = [random_mix(data, draw) for _ in range(mixes)]
    accuracy = torch.tensor([reward_accuracy(data, mix, test) for mix in tried]).double()
    found = torch.stack([counts(data, mix) for mix in tried])
    fit = mixes * 3 // 4
    predictor = fit_predictor(found[:fit], accuracy[:fit])
    told = torch.stack([predictor(found[fit:]), accuracy[fit:]])
    fresh, budget = pairs(size, seed=3), size // 3  # pairs that no mix has seen
    routed = route(fresh, predictor, budget)
    random = torch.zeros(size, dtype=torch.bool)
    random[torch.randperm(size, generator=draw)[:budget]] = True
    everyone = torch.ones(size, dtype=torch.bool)
    result = {
        "correlation": torch.corrcoef(told)[0, 1].item(),
        "all_model": reward_accuracy(fresh, ~everyone, test),
        "all_people": reward_accuracy(fresh, everyone, test),
        "random": reward_accuracy(fresh, random, test),
        "routed": reward_accuracy(fresh, routed, test),
        "to_people": routed.double().mean().item(),
    }
    gains = dict(zip(TAGS, (predictor.gains * 100).tolist(), strict=True))
    for name, value in (
        result | {f"gain of 100 {tag}": gain for tag, gain in gains.items()}
    ).items():
        print(f"{name:24s} {value:.3f}")
    return result | {f"gain_{tag}": gain for tag, gain in gains.items()}


if __name__ == "__main__":
    main()
