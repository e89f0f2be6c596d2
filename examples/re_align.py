"""Re-Align (arXiv 2502.13146): rejected answers and rejected pictures from one that looks alike.

    python examples/re_align.py

For every picture the most similar ones of a gallery are retrieved, by the embeddings of the model's
vision tower. Words of the good answer are masked and the model fills them in while it looks at
the similar picture: a hallucination, the rejected answer. rDPO prefers the good answer over it, and
the picture over the retrieved one (`mm_dpo` with w_anchor=0, a third row under the other picture).
The authors' code scores another label in two of its rows; here the formula is the paper's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import bdhs
import tiny_pictures as tiny
import torch
from torch import Tensor

from prefkern.integrations.preference_model import PreferenceModel

MASKED = (3, 8)  # words that are masked, the two colours
Row = dict[str, Any]


@torch.no_grad()
def embed(policy: Any, pictures: Sequence[Tensor]) -> Tensor:  # [B, D] of length 1
    """What the vision tower makes of pictures, place by place."""
    states = policy.model.vision_tower(torch.stack(list(pictures))).last_hidden_state[:, 1:]
    return torch.nn.functional.normalize(states.flatten(1), dim=-1)


def nearest(policy: Any, rows: Sequence[Row], gallery: Sequence[Row], count: int) -> Tensor:
    """Places in the gallery of the `count` pictures most like each row's, [B, count]; one of which
    the same can be said is the same picture here."""
    queries, keys = (embed(policy, [row["images"][0] for row in some]) for some in (rows, gallery))
    same = torch.tensor([[a["chosen"] == b["chosen"] for b in gallery] for a in rows])
    return (queries @ keys.T).masked_fill(same, -1.0).topk(count).indices


def hallucinated(policy: Any, rows: Sequence[Row], pictures: Sequence[Tensor]) -> list[str]:
    """The rows' good answers with the masked words as the model gives them for `pictures`."""
    words = [row["chosen"].split() for row in rows]
    shown = [row | {"images": [other]} for row, other in zip(rows, pictures, strict=True)]
    for place in MASKED:
        begun = [" ".join(answer[:place]) for answer in words]
        texts = tiny.continued(policy, shown, begun)
        for answer, text in zip(words, texts, strict=True):
            answer[place] = (text.split() + [""] * 99)[place] or "."
    return [" ".join(answer) for answer in words]


def pairs_of(policy: Any, rows: Sequence[Row], gallery: Sequence[Row], count: int = 4) -> list[Row]:
    """Rows with a rejected answer and `cond_images`, the most similar picture of `count` that made
    the model say something else; rows without one are left out."""
    found: list[Row] = []
    places, left = nearest(policy, rows, gallery, count), list(range(len(rows)))
    for rank in range(count):
        if not left:
            break
        others = [gallery[int(places[i, rank])]["images"][0] for i in left]
        texts = hallucinated(policy, [rows[i] for i in left], others)
        again = []
        for i, other, text in zip(left, others, texts, strict=True):
            if text == rows[i]["chosen"]:
                again.append(i)
            else:
                found.append(rows[i] | {"rejected": text, "cond_images": [other]})
        left = again
    return found


@torch.no_grad()
def picture_margin(policy: Any, rows: Sequence[Row]) -> float:
    """Nats by which the good answer is likelier under its picture than under the retrieved one."""
    batch = tiny.batch(rows, ("chosen", "cond"))
    labels = batch.pop("labels")[:, 1:]
    logp = policy(**batch).logits[:, :-1].log_softmax(-1)
    logp = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    total = logp.masked_fill(labels == -100, 0.0).sum(1)
    return (total[0::2] - total[1::2]).mean().item()


def align(begin: Any, pairs: Sequence[Row], loss: str, **args: float) -> Any:
    policy = copy.deepcopy(begin)
    step = PreferenceModel(policy, loss, ref=copy.deepcopy(begin), beta=0.1, metrics=False, **args)
    sides = ("chosen", "rejected", "cond")[: 3 if loss == "mm_dpo" else 2]
    tiny.fit(step, pairs, rate=2e-4, sides=sides, epochs=3)
    return policy.eval()


def main(count: int = 224) -> dict[str, float]:
    begin = bdhs.start()
    rows, gallery = (bdhs.captions(n, seed, 0.0) for n, seed in ((count, 3), (400, 4)))
    held_out = bdhs.captions(200, seed=2, biased=0.0)
    pairs = pairs_of(begin, rows, gallery)
    test_pairs = pairs_of(begin, held_out[:64], gallery)

    def shared(a: Row, b: Row) -> int:  # colours in the same place
        return sum(a["chosen"].split()[i] == b["chosen"].split()[i] for i in MASKED)

    places = nearest(begin, rows, gallery, 1)[:, 0].tolist()
    retrieved = [shared(row, gallery[place]) for row, place in zip(rows, places, strict=True)]
    random = [shared(row, other) for row, other in zip(rows, gallery, strict=False)]
    found = {
        "pairs": float(len(pairs)),
        "shared_retrieved": sum(retrieved) / count,
        "shared_random": sum(random) / count,
        "before": bdhs.completes(begin, held_out),
        "margin_before": picture_margin(begin, test_pairs),
    }  # fmt: skip
    for name, loss, args in (("dpo", "dpo", {}), ("rdpo", "mm_dpo", {"w_anchor": 0.0})):
        policy = align(begin, pairs, loss, **args)
        found[f"{name}_after"] = bdhs.completes(policy, held_out)
        found[f"{name}_margin"] = picture_margin(policy, test_pairs)
    for name, value in found.items():
        print(f"{name:18s} {value:.3f}")
    return found


if __name__ == "__main__":
    main()
