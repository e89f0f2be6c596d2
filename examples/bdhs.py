"""BDHS (arXiv 2407.02477): rejected answers are what the model says when it cannot see.

    python examples/bdhs.py

The image tokens are masked in the policy's attention, so that it completes the beginning of a good
answer from what it expects alone. A completion that is as good as the good answer is sampled again,
and given up after a few tries; the others are the rejected answers of DPO. The world here: the
bottom of a picture mostly has the colour that goes with its top, and the model believes it. Written
after summaries of the paper, which compares sentences by their embeddings; here it is the share of
equal words.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import tiny_pictures as tiny
import torch

from prefkern.integrations.preference_model import PreferenceModel

PARTNER = {"red": "blue", "blue": "red", "green": "yellow", "yellow": "green"}
BEGIN = 8  # words of the good answer that are given: up to the colour of the bottom
Row = dict[str, Any]


def captions(count: int, seed: int, biased: float) -> list[Row]:
    """Pictures and what they show; the share `biased` has partners as colours."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        top = rng.choice([*tiny.COLOURS])
        bottom = PARTNER[top] if rng.random() < biased else rng.choice([*tiny.COLOURS])
        text = f"the top is {top} and the bottom is {bottom} ."
        image = tiny.picture(top, bottom, rng=rng)
        rows.append({"images": [image], "prompt": "describe :", "chosen": text})
    return rows


def similarity(one: str, other: str) -> float:
    """Share of words that are the same, place by place."""
    a, b = one.split(), other.split()
    return sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b))


def sample_rejected(
    policy: Any, rows: Sequence[Row], *, seen: float, threshold: float = 0.95, tries: int = 3
) -> list[Row]:
    """The rows for which a completion less similar than `threshold` was found, with it.

    Args:
        seen: Share of the image tokens that are not masked: 0 is BDHS, 1 plain sampling.
    """
    found: list[Row] = []
    left = list(rows)
    for number in range(tries):
        if not left:
            break
        begun = [" ".join(row["chosen"].split()[:BEGIN]) for row in left]
        texts = tiny.continued(policy, left, begun, temperature=0.7, seen=seen, seed=number)
        again = []
        for row, text in zip(left, texts, strict=True):
            if similarity(text, row["chosen"]) < threshold:
                found.append(row | {"rejected": text})
            else:
                again.append(row)
        left = again
    return found


@torch.no_grad()
def depends_on_picture(policy: Any, seen: float) -> float:
    """Largest difference of the next token's logits between two pictures under one beginning."""
    one, other = captions(2, seed=5, biased=0.0)
    text = " ".join(one["chosen"].split()[:BEGIN])
    at = torch.tensor([tiny.ids(f"{one['prompt']} {text}", 1)] * 2)
    mask = ((at != 2) | (seen > 0)).long()
    pixels = torch.stack([one["images"][0], other["images"][0]])
    logits = policy(input_ids=at, attention_mask=mask, pixel_values=pixels).logits[:, -1]
    return (logits[0] - logits[1]).abs().max().item()


def start() -> Any:
    """A model that has read captions without pictures, all with partners, and some with."""
    blind = [row | {"images": []} for row in captions(400, seed=9, biased=1.0)]
    return tiny.taught([*captions(1400, seed=1, biased=0.85), *blind])


def completes(policy: Any, rows: Sequence[Row]) -> float:
    """Share of rows whose beginning is completed as the picture shows."""
    begun = [" ".join(row["chosen"].split()[:BEGIN]) for row in rows]
    texts = tiny.continued(policy, rows, begun)
    return sum(x == row["chosen"] for x, row in zip(texts, rows, strict=True)) / len(rows)


def align(begin: Any, pairs: Sequence[Row]) -> Any:
    """DPO from `begin`, which is the reference."""
    policy = copy.deepcopy(begin)
    step = PreferenceModel(policy, "dpo", ref=copy.deepcopy(begin), beta=0.1, metrics=False)
    tiny.fit(step, pairs, rate=2e-4, sides=("chosen", "rejected"), epochs=3)
    return policy.eval()


def main(count: int = 256) -> dict[str, float]:
    begin = start()
    held_out, rows = captions(200, seed=2, biased=0.0), captions(count, seed=3, biased=0.0)
    found = {"sees": depends_on_picture(begin, 1.0), "masked": depends_on_picture(begin, 0.0)}
    found["before"] = completes(begin, held_out)
    for name, seen in (("bdhs", 0.0), ("plain", 1.0)):
        pairs = sample_rejected(begin, rows, seen=seen)
        found[f"{name}_pairs"] = len(pairs)
        words = [(PARTNER[r["chosen"].split()[3]], r["rejected"].split()[BEGIN:]) for r in pairs]
        found[f"{name}_biased"] = sum(word in said for word, said in words) / len(pairs)
        alike = [similarity(row["chosen"], row["rejected"]) for row in pairs]
        found[f"{name}_most_similar"] = max(alike)
        if name == "bdhs":
            found["after"] = completes(align(begin, pairs), held_out)
    for name, value in found.items():
        print(f"{name:20s} {value:.3f}")
    return found


if __name__ == "__main__":
    main()
