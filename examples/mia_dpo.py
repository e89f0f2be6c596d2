"""MIA-DPO (arXiv 2410.17637): pictures that nobody asked about, and answers that looked at them.

    python examples/mia_dpo.py

A question about one picture becomes one about several: pictures in sequence, a grid of them in one
picture, one picture inside another. Nobody judges the policy's answers: the share of its attention
to pictures that goes to the one asked about tells which were looked up elsewhere, and those are
rejected; chosen is the answer that the single picture has. Written after summaries of the paper;
its further filters (perplexity, length, edit distance) are about sentences.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import tiny_pictures as tiny
import torch
from torch import Tensor

from prefkern.integrations.preference_model import PreferenceModel

FORMATS = ("sequence", "grid", "inside")
Row = dict[str, Any]


def row_of(form: str, rng: random.Random, first: float = 0.5) -> Row:
    """A question about one of several pictures; `target` are the places of its tokens among all.

    Args:
        first: Share of questions about the first picture, or about the outer one.
    """
    colours, which = rng.sample([*tiny.COLOURS], 2), int(rng.random() >= first)
    if form == "sequence":
        images = [tiny.picture(colour, rng=rng) for colour in colours]
        question, target = f"picture {which + 1}", range(4 * which, 4 * which + 4)
    elif form == "grid":
        images, question = [tiny.picture(*colours, rng=rng)], f"cell {which + 1}"
        target = range(2 * which, 2 * which + 2)
    else:
        cells = [colours[i == 3] for i in range(4)]
        images, question = [tiny.picture(*cells, rng=rng)], ("around", "inside")[which]
        target = [3] if which else [0, 1, 2]
    answer = f"{colours[which]} ."
    return {"images": images, "prompt": question, "chosen": answer, "target": list(target)}


def rows_of(form: str, count: int, seed: int, first: float = 0.5) -> list[Row]:
    rng = random.Random(f"{form} {seed}")
    return [row_of(form, rng, first) for _ in range(count)]


@torch.no_grad()
def attention_ratios(policy: Any, rows: Sequence[Row], answers: Sequence[str]) -> Tensor:  # [B]
    """Of the attention of an answer's words to pictures, the share that goes to the target; a mean
    over words, heads and layers. All rows have equally many pictures."""
    count = 4 * len(rows[0]["images"])
    begun = [tiny.ids(row["prompt"], len(row["images"])) for row in rows]
    texts = [begin + tiny.ids(text)[:2] for begin, text in zip(begun, answers, strict=True)]
    at = torch.tensor([text + [0] * (len(begun[0]) + 2 - len(text)) for text in texts])
    pixels = torch.stack([image for row in rows for image in row["images"]])
    out = policy(input_ids=at, pixel_values=pixels, output_attentions=True)
    # [B, words, pictures' tokens]: positions that predict words
    seen = torch.stack(out.attentions).mean((0, 2))[:, len(begun[0]) - 1 : -1, :count]
    wanted = torch.zeros(len(rows), count)
    for i, row in enumerate(rows):
        wanted[i, row["target"]] = 1.0
    return ((seen * wanted[:, None]).sum(-1) / seen.sum(-1)).mean(-1)


def filtered(policy: Any, rows: Sequence[Row], keep: float) -> list[Row]:
    """Pairs out of the policy's own answers: the share `keep` with the lowest attention ratios is
    rejected, but for those that are the chosen ones."""
    answers = tiny.continued(policy, rows, [""] * len(rows))
    ratios = attention_ratios(policy, rows, answers)
    order = ratios.argsort().tolist()[: round(keep * len(rows))]
    return [
        {**rows[i], "rejected": answers[i], "ratio": ratios[i].item()}
        for i in order
        if answers[i] != rows[i]["chosen"]
    ]


def main(count: int = 128, keep: float = 0.6) -> dict[str, float]:
    """Errors among low and high ratios, accuracy before and after, by format."""
    begin = tiny.taught(
        [r for form in FORMATS for r in rows_of(form, 400, 1, first=0.7)], rate=3e-3
    )
    held_out = {form: rows_of(form, 100, seed=2) for form in FORMATS}
    found: dict[str, float] = {}
    pairs: list[Row] = []
    for form in FORMATS:
        rows = rows_of(form, count, seed=3)
        answers = tiny.continued(begin, rows, [""] * count)
        order = attention_ratios(begin, rows, answers).argsort().tolist()
        wrong = [answers[i] != rows[i]["chosen"] for i in order]
        found[f"{form}_wrong_low"] = sum(wrong[: count // 2]) / (count // 2)
        found[f"{form}_wrong_high"] = sum(wrong[count // 2 :]) / (count - count // 2)
        pairs += filtered(begin, rows, keep)
        found[f"{form}_before"] = tiny.accuracy(begin, held_out[form])
    policy = copy.deepcopy(begin)
    step = PreferenceModel(
        policy, ["dpo", "sft"], ref=copy.deepcopy(begin), beta=0.5, metrics=False
    )
    tiny.fit(step, pairs, rate=1e-3, sides=("chosen", "rejected"), epochs=5)
    for form in FORMATS:
        found[f"{form}_after"] = tiny.accuracy(policy.eval(), held_out[form])
    found["pairs"] = len(pairs)
    for name, value in sorted(found.items()):
        print(f"{name:20s} {value:.3f}")
    return found


if __name__ == "__main__":
    main()
