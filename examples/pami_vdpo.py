"""PaMi-VDPO (arXiv 2504.05810): one answer, two clips, and which augmented clip is worth rejecting.

    python examples/pami_vdpo.py

VDPO prefers an answer under its clip over the same answer under an augmented one. Under some
prompts an augmented clip still shows the answer (reversed in time, its colours are the same), and
rejecting it teaches a falsehood. So several are made: the closest in what the vision tower sees are
kept, and of these the one that moves the policy's answer most under this prompt, by the
Jensen-Shannon divergence of its next words, is rejected. Abstract and summaries read. The loss is
`mm_dpo` with w_text = w_anchor = 0, which is `dpo` with the rejected side under other pictures.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import tiny_pictures as tiny
import torch
from torch import Tensor

from prefkern.integrations.preference_model import PreferenceModel

PROMPTS = ("first", "colours")
AUGMENTATIONS = ("noise", "reverse", "recolour_first", "recolour_last")
Row = dict[str, Any]


def answer(colours: Sequence[str], prompt: str) -> str:
    """What a clip of two frames shows: its first colour, or both, in no order of time."""
    palette = [*tiny.COLOURS]
    shown = [colours[0]] if prompt == "first" else sorted(colours, key=palette.index)
    return f"{' and '.join(shown)} ."


def clips(count: int, seed: int) -> list[Row]:
    rng, rows = random.Random(seed), []
    for i in range(count):
        colours, prompt = rng.sample([*tiny.COLOURS], 2), PROMPTS[i % 2]
        images = [tiny.picture(colour, rng=rng) for colour in colours]
        row = {"images": images, "prompt": prompt, "colours": colours}
        rows.append(row | {"chosen": answer(colours, prompt)})
    return rows


def augmented(row: Row, how: str, rng: random.Random) -> Row:
    """The row with its clip changed; `chosen` stays."""
    images, colours = list(row["images"]), list(row["colours"])
    if how == "noise":
        images = [x + 0.1 * tiny.picture("red", rng=rng).roll(rng.randrange(8), -1) for x in images]
    elif how == "reverse":
        images, colours = images[::-1], colours[::-1]
    else:
        at = 0 if how == "recolour_first" else 1
        colours[at] = rng.choice([c for c in tiny.COLOURS if c not in colours])
        images[at] = tiny.picture(colours[at], rng=rng)
    return row | {"images": images, "colours": colours}


@torch.no_grad()
def seen(policy: Any, rows: Sequence[Row]) -> Tensor:  # [B, D]
    """What the vision tower sees of clips, whatever is asked."""
    pixels = torch.stack([image for row in rows for image in row["images"]])
    return policy.model.vision_tower(pixels).last_hidden_state.flatten(1).view(len(rows), -1)


@torch.no_grad()
def next_words(policy: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T, V] along the chosen answers, and where they are scored [B, T]."""
    batch = tiny.batch(rows, ("chosen",))
    labels = batch.pop("labels")[:, 1:]
    return policy(**batch).logits[:, :-1].log_softmax(-1), labels != -100


def js_divergence(policy: Any, rows: Sequence[Row], others: Sequence[Row]) -> Tensor:  # [B]
    """Between the answers under two clips each, a mean over their words, in nats."""
    (p, scored), (q, _) = next_words(policy, rows), next_words(policy, others)
    m = torch.logaddexp(p, q) - torch.tensor(2.0).log()
    each = 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1)
    return (each * scored).sum(1) / scored.sum(1)


def choose(policy: Any, rows: Sequence[Row], rng: random.Random, keep: int = 3) -> list[Row]:
    """Close to far: of the `keep` clips that look most like the original, the one under which the
    answer to this prompt differs most. Pairs whose rejected side has that clip."""
    made = [[augmented(row, how, rng) for row in rows] for how in AUGMENTATIONS]
    own = seen(policy, rows)
    far = torch.stack([(seen(policy, some) - own).norm(dim=-1) for some in made])  # [A, B]
    moved = torch.stack([js_divergence(policy, rows, some) for some in made])
    close = far <= far.topk(keep, 0, largest=False).values[-1]
    best = moved.masked_fill(~close, -1.0).argmax(0).tolist()
    return [_pair(row, made[k][i]) for i, (row, k) in enumerate(zip(rows, best, strict=True))]


def chance(policy: Any, rows: Sequence[Row], rng: random.Random) -> list[Row]:
    """Pairs with any of the augmented clips."""
    return [_pair(row, augmented(row, rng.choice(AUGMENTATIONS), rng)) for row in rows]


def _pair(row: Row, other: Row) -> Row:
    same = answer(other["colours"], row["prompt"]) == row["chosen"]
    return row | {"rejected": row["chosen"], "rejected_images": other["images"], "false": same}


def align(
    begin: Any, rows: Sequence[Row], choice: Callable[..., list[Row]], rounds: int = 4
) -> tuple[Any, float]:
    """VDPO, the clips chosen by the policy as it is; and the share of false rejections."""
    policy, rng, wrong = copy.deepcopy(begin), random.Random(0), 0
    loss = ["dpo", "sft"]  # the likelihood keeps answers whole in so small a model
    step = PreferenceModel(policy, loss, ref=copy.deepcopy(begin), beta=0.1, metrics=False)
    for _ in range(rounds):
        pairs = choice(policy.eval(), rows, rng)
        wrong += sum(pair["false"] for pair in pairs)
        tiny.fit(step, pairs, rate=3e-4, sides=("chosen", "rejected"))
    return policy.eval(), wrong / (rounds * len(rows))


@torch.no_grad()
def margins(policy: Any, rows: Sequence[Row]) -> dict[str, float]:
    """Nats by which answers are likelier under their clip than under those that show another answer
    (`margin`), and under those that show the same one (`bias`, which should be 0)."""
    pairs = chance(policy, rows, random.Random(1))
    batch = tiny.batch(pairs, ("chosen", "rejected"))
    labels = batch.pop("labels")[:, 1:, None]
    logp = policy(**batch).logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0))
    total = logp.masked_fill(labels == -100, 0.0).sum((1, 2))
    gap, same = total[0::2] - total[1::2], torch.tensor([pair["false"] for pair in pairs])
    return {"margin": gap[~same].mean().item(), "bias": gap[same].mean().item()}


def main(count: int = 192) -> dict[str, float]:
    begin = tiny.taught(clips(500, seed=1), rate=3e-3)
    rows, held_out = clips(count, seed=2), clips(200, seed=3)
    found = {f"before_{name}": value for name, value in margins(begin, held_out).items()}
    found["before"] = tiny.accuracy(begin, held_out)
    for name, choice in (("aware", choose), ("random", chance)):
        policy, found[f"{name}_false"] = align(begin, rows, choice)
        found[f"{name}_after"] = tiny.accuracy(policy, held_out)
        found |= {f"{name}_{key}": value for key, value in margins(policy, held_out).items()}
    for name, value in found.items():
        print(f"{name:14s} {value:.3f}")
    return found


if __name__ == "__main__":
    main()
