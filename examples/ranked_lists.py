"""Ranked lists of three or four answers, ragged: LiPO's lambda loss and Plackett-Luce.

    python examples/ranked_lists.py

Lists go in as they are: no padding to the longest list, no pairs made of them.
"""

from __future__ import annotations

import copy
from typing import Any

import tiny
import torch

from prefkern.integrations.preference_model import PreferenceModel


def batch_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of answers, their lists' boundaries and relevance."""
    tokenizer = tiny.tokenizer()
    answers = [(row["prompt"], answer) for row in rows for answer in row["responses"]]
    ids = [tokenizer(p)["input_ids"] + tokenizer(a, add_special_tokens=False)["input_ids"] + [2]
           for p, a in answers]  # fmt: skip
    start = [len(tokenizer(p)["input_ids"]) for p, _ in answers]
    width = max(map(len, ids))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    position = torch.arange(width)
    scored = (position >= torch.tensor(start)[:, None]) & (
        position < torch.tensor([len(row) for row in ids])[:, None]
    )
    sizes = torch.tensor([0] + [len(row["responses"]) for row in rows])
    return {
        "input_ids": input_ids,
        "attention_mask": (position < torch.tensor([len(r) for r in ids])[:, None]).long(),
        "labels": input_ids.masked_fill(~scored, -100),
        "cu_groups": sizes.cumsum(0).int(),
        "relevance": torch.tensor([s for row in rows for s in row["scores"]]),
    }


def fit(loss: str, policy: Any, reference: Any, rows: list[dict[str, Any]], **args: Any) -> Any:
    step = PreferenceModel(policy, loss, ref=reference, **args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for at in range(0, len(rows), 8):
        out = step(**batch_of(rows[at : at + 8]))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def main(lists: int = 240) -> dict[str, dict[str, float]]:
    begin = tiny.start()
    train = tiny.lists(lists, sizes=(3, 4))
    held_out = batch_of(tiny.lists(60, seed=1, sizes=(3, 4)))
    found = {}
    for loss, args in (("lipo", {"beta": 0.5}), ("plackett_luce", {"beta": 0.5})):
        policy, reference = copy.deepcopy(begin), copy.deepcopy(begin)
        step = fit(loss, policy, reference, train, **args)
        with torch.no_grad():
            start = PreferenceModel(copy.deepcopy(begin), loss, ref=reference, **args)
            before, after = start(**held_out), step(**held_out)
        found[loss] = {
            "loss_before": before.loss.item(),
            "loss_after": after.loss.item(),
            "ndcg_after": after.metrics["rank/ndcg"].item(),
            "kendall_tau_after": after.metrics["rank/kendall_tau"].item(),
        }
        print(loss, {name: round(value, 3) for name, value in found[loss].items()})
    return found


if __name__ == "__main__":
    main()
