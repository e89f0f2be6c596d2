"""VerIPO's loop (arXiv 2505.19000): GRPO explores, a verifier makes pairs, DPO learns.

    python examples/veripo_rounds.py

The reward of GRPO sees the outcome alone, here the last adjective. The verifier reads the whole
rollout: chosen are those whose outcome is right and whose way there holds, rejected first those
with a right outcome by a wrong way, which the reward cannot tell apart. The next round explores
from the model that DPO left. The paper's verifier is a small language model and its rollouts are
about videos; here it is a function of words.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import tiny
import torch

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.preference_model import PreferenceModel
from prefkern.losses.advantages import group_advantages
from prefkern.train.recipes.online.sampling import sample_answers

PROMPTS = [f"tell of the {animal} :" for animal in tiny.ANIMALS]
GROUP = 8  # answers to a prompt, an even number
Rollouts = Mapping[str, dict[str, None]]  # prompt -> its answers, in the order they came


def either(*words: str) -> str:
    return f"({'|'.join(words)})"


KIND, ANIMAL = either(*tiny.GOOD, *tiny.BAD), either(*tiny.ANIMALS)
FORM = re.compile(
    f" a {KIND} {ANIMAL} {either(*tiny.VERBS)} the {KIND} {either(*tiny.THINGS)} "
    f"by the {either(*tiny.PLACES)} with a {KIND} friend [.]"
)


def outcome(answer: str) -> bool:
    """Well formed, and the adjective at the end is good: all that the reward reads."""
    form = FORM.fullmatch(answer)
    return form is not None and form[7] in tiny.GOOD


def verify(prompt: str, answer: str) -> bool:
    """A right outcome, and before it the animal that was asked for and good adjectives."""
    form = FORM.fullmatch(answer)
    if form is None or not outcome(answer):
        return False
    return form[2] == prompt.split()[-2] and {form[1], form[4]} <= set(tiny.GOOD)


def sampled(policy: Any, seed: int, count: int) -> list[list[str]]:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    found = sample_answers(
        policy, tiny.tokenizer(), rows, num_generations=count, max_new_tokens=18, seed=seed
    )
    return [[answer.text for answer in row] for row in found]


def explore(policy: Any, steps: int, seed: int, rate: float = 1e-3) -> Rollouts:
    """GRPO in place, one update per sampling; all its rollouts."""
    collate = PairCollator(tiny.tokenizer())  # two answers of a group a row
    step = PreferenceModel(policy, "grpo", beta=0.0, metrics=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate)
    cu_groups = torch.arange(0, GROUP * len(PROMPTS) + 1, GROUP, dtype=torch.int32)
    rollouts: dict[str, dict[str, None]] = defaultdict(dict)
    for number in range(steps):
        answers = sampled(policy, seed + number, GROUP)
        rows = []
        for prompt, group in zip(PROMPTS, answers, strict=True):
            rollouts[prompt].update(dict.fromkeys(group))
            twos = zip(group[::2], group[1::2], strict=True)
            rows += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in twos]
        rewards = torch.tensor([float(outcome(x)) for group in answers for x in group])
        out = step(**collate(rows), advantages=group_advantages(rewards, cu_groups))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return rollouts


def curate(rollouts: Rollouts, per_prompt: int) -> list[dict[str, str]]:
    """Pairs of a verified rollout and one that fails; of the failing ones first those whose outcome
    is right. A prompt without both gives none."""
    pairs = []
    for prompt, answers in rollouts.items():
        chosen = [answer for answer in answers if verify(prompt, answer)]
        failing = [answer for answer in answers if not verify(prompt, answer)]
        failing.sort(key=outcome, reverse=True)
        if not chosen:
            continue
        for number, rejected in enumerate(failing[:per_prompt]):
            best = chosen[number % len(chosen)]
            pairs.append({"prompt": prompt, "chosen": best, "rejected": rejected})
    return pairs


def align(policy: Any, pairs: list[dict[str, str]], rate: float = 1e-3) -> None:
    """DPO in place, against the model that GRPO left, and the likelihood of the chosen beside it:
    so few are verified that DPO alone lowers both sides."""
    step = PreferenceModel(
        policy, ["dpo", "sft"], ref=copy.deepcopy(policy), beta=0.1, metrics=False
    )
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    tiny.fit(step, [pairs[i] for i in order], rate=rate)


def measure(policy: Any) -> dict[str, float]:
    """Shares of sampled answers with a right outcome, and with a right way to it."""
    answers = sampled(policy, seed=10_000, count=32)
    found = [(prompt, x) for prompt, group in zip(PROMPTS, answers, strict=True) for x in group]
    return {
        "outcome": sum(outcome(x) for _, x in found) / len(found),
        "verified": sum(verify(*pair) for pair in found) / len(found),
    }


def main(rounds: int = 2, steps: int = 8, per_prompt: int = 24) -> dict[str, Any]:
    begin = tiny.start(steps=160)
    found: dict[str, Any] = {"before": measure(begin), "pairs": []}
    policy = copy.deepcopy(begin)
    for number in range(rounds):
        rollouts = explore(policy, steps, seed=1000 * number)
        found[f"explored_{number + 1}"] = measure(policy)
        pairs = curate(rollouts, per_prompt)
        if not pairs:
            raise ValueError("no rollout was verified: explore for more steps.")
        align(policy, pairs)
        found[f"aligned_{number + 1}"] = measure(policy)
        found["pairs"].append(len(pairs))
    alone = copy.deepcopy(begin)
    explore(alone, rounds * steps, seed=0)
    found["grpo_alone"] = measure(alone)
    for name, value in found.items():
        print(f"{name:12s}", value)
    return found


if __name__ == "__main__":
    main()
