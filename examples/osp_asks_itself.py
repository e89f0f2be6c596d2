"""OSP: the policy is asked in words which of two of its own answers is better.

    python examples/osp_asks_itself.py

The policy has read answers with more bad words than good ones, and comparisons that are true nine
times in ten: it judges better than it writes. Every round it writes four answers to a prompt, is
asked about every two of them in both orders, and its mean probability for the first is the label:
of pairs (soft_label), or of lists (soft_pairs). Nothing else says what is good. Reference and judge
of a round are the policy it began with.

Source: arXiv 2405.14103, from descriptions. Which pairs the paper keeps of a ranking is not known;
all are kept here.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from step_search import Words, fit, next_logps, sample

from prefkern import prep
from prefkern.integrations.preference_model import PreferenceModel

GOOD, BAD = ["kind", "warm", "calm", "clean"], ["mean", "cold", "dull", "rough"]
ANIMALS = ["cat", "dog", "fox", "owl"]
WORDS = Words(f"tell of : a and . or ? first second {' '.join(GOOD + BAD + ANIMALS)}")
K = 4


def written(rng: random.Random, animal: str, share: float = 0.35) -> str:
    one, two, three = (rng.choice(GOOD if rng.random() < share else BAD) for _ in range(3))
    return f"a {one} {two} {animal} and a {three} {rng.choice(ANIMALS)} ."


def good_words(text: str) -> int:
    return sum(word in GOOD for word in text.split())


def question(prompt: str, one: str, two: str) -> str:
    return f"{prompt} {one} or {two} ?"


def lessons(count: int, seed: int) -> list[dict[str, str]]:
    rng, rows = random.Random(seed), []
    for _ in range(count):
        animal = rng.choice(ANIMALS)
        prompt = f"tell of {animal} :"
        one, two = (written(rng, animal, share) for share in rng.sample((0.2, 0.5, 0.8), 2))
        rows.append({"prompt": prompt, "chosen": written(rng, animal)})
        if good_words(one) != good_words(two):
            truth = (good_words(one) > good_words(two)) == (rng.random() < 0.9)
            asked = question(prompt, one, two)
            rows.append({"prompt": asked, "chosen": "first" if truth else "second"})
    return rows


def start(seed: int = 0, count: int = 3000) -> Any:
    model = WORDS.model(seed)
    fit(model, WORDS, lessons(count, seed), rate=3e-3, batch=32)
    return model


def answers(policy: Any, count: int) -> list[dict[str, Any]]:
    """Lists of prompt and the distinct ones of K answers, two at least."""
    prompts = [f"tell of {ANIMALS[i % 4]} :" for i in range(count)]
    texts = [a for a, _ in sample(policy, WORDS, [p for p in prompts for _ in range(K)], (".",), 9)]
    lists = [list(dict.fromkeys(texts[i * K : i * K + K])) for i in range(count)]
    rows = zip(prompts, lists, strict=True)
    return [{"prompt": p, "responses": x} for p, x in rows if len(x) > 1]


def judged(policy: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds `pref_probs` [K][K]: the policy's word on every two answers, both orders."""
    asked = [
        question(row["prompt"], one, two)
        for row in rows for one in row["responses"] for two in row["responses"] if one != two
    ]  # fmt: skip
    said = next_logps(policy, WORDS, asked)[:, WORDS.encode("first second")].softmax(-1)
    says = dict(zip(asked, said[:, 0].tolist(), strict=True))
    for row in rows:

        def wins(one: str, two: str, prompt: str = row["prompt"]) -> float:
            if one == two:
                return 0.5
            first, second = question(prompt, one, two), question(prompt, two, one)
            return (says[first] + 1.0 - says[second]) / 2.0

        texts = row["responses"]
        row["pref_probs"] = [[wins(one, two) for two in texts] for one in texts]
    return rows


def by_pairs(step: Any, rows: list[dict[str, Any]]) -> None:
    pairs = prep.pairs_from_judgements(rows)
    random.Random(0).shuffle(pairs)
    fit(step, WORDS, pairs, rate=5e-4, batch=32)


def by_lists(step: Any, rows: list[dict[str, Any]]) -> None:
    optimizer = torch.optim.AdamW(step.parameters(), lr=5e-4)
    for at in range(0, len(rows), 6):
        part, texts, sizes, pairs, probs = rows[at : at + 6], [], [0], [], []
        for row in part:
            count, first = len(row["responses"]), len(texts)
            two = [(i, j) for i in range(count) for j in range(i)]
            pairs += [(first + i, first + j) for i, j in two]
            probs += [row["pref_probs"][i][j] for i, j in two]
            texts += [{"prompt": row["prompt"], "chosen": text} for text in row["responses"]]
            sizes.append(len(texts))
        loss, _ = step(
            **WORDS.batch(texts, ("chosen",)), cu_groups=torch.tensor(sizes, dtype=torch.int32),
            relevance=torch.zeros(len(texts)), pairs=torch.tensor(pairs),
            pref_prob=torch.tensor(probs),
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def share_good(policy: Any) -> float:
    """Good words of the three that an answer has room for."""
    texts = sample(policy, WORDS, [f"tell of {a} :" for a in ANIMALS for _ in range(50)], (".",), 9)
    return sum(good_words(text) for text, _ in texts) / (3 * len(texts))


def main(loss: str = "soft_label", rounds: int = 3, begin: Any = None) -> dict[str, float]:
    policy = copy.deepcopy(begin) if begin is not None else start()
    found = {"before": share_good(policy)}
    for k in range(rounds):
        step = PreferenceModel(policy, loss, ref=copy.deepcopy(policy), beta=0.2)
        rows = judged(policy, answers(policy, 48))
        {"soft_label": by_pairs, "soft_pairs": by_lists}[loss](step, rows)
        found[f"after round {k + 1}"] = share_good(policy)
    print(loss, {name: round(value, 3) for name, value in found.items()})
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    base = start()
    for name in ("soft_label", "soft_pairs"):
        main(name, begin=base)
