"""KTO: thumbs up and down on single answers, each judged alone.

    python examples/kto_thumbs.py

The baseline of KTO is the batch's own estimate of KL(policy to reference): the log-ratio of answers
under the prompts of other rows.
"""

from __future__ import annotations

import copy
from typing import Any

import tiny
import torch

from prefkern import SeqStats, losses
from prefkern.integrations.collate import PairCollator
from prefkern.integrations.head_view import shifted
from prefkern.integrations.loss_at_head import read_other
from prefkern.integrations.preference_model import PreferenceModel


def mismatched(policy: Any, reference: Any, rows: list[dict[str, str]]) -> SeqStats:
    """The sums [S] of every answer under its neighbour's prompt."""
    turned = [
        {"prompt": other["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    batch = PairCollator(tiny.tokenizer())(turned)
    targets = shifted(batch.pop("labels"))
    own, other = (
        read_other(m, batch, targets, distribution=False).double().sum(-1)
        for m in (policy, reference)
    )
    return SeqStats(logp=own, ref_logp=other)


def main(answers: int = 640) -> dict[str, float]:
    begin = tiny.start()
    held_out = tiny.pairs(100, seed=1)
    policy, reference = copy.deepcopy(begin), copy.deepcopy(begin)
    step = PreferenceModel(policy, "kto", ref=reference, beta=0.5, undesirable_weight=0.5)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    rows, collate, seen = tiny.pairs(answers // 2), PairCollator(tiny.tokenizer()), []
    for at in range(0, len(rows), 16):
        part = rows[at : at + 16]
        baseline = losses.pointwise.kto.kl_baseline(mismatched(policy, reference, part))
        liked = torch.tensor([True, False] * len(part))  # in the order of the collator's rows
        out = step(**collate(part), desirable=liked, kl_baseline=baseline)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(out.loss.item())
    found = {
        "before": tiny.accuracy(begin, held_out),
        "after": tiny.accuracy(policy, held_out),
        "first_loss": seen[0],
        "last_loss": seen[-1],
    }
    print({name: round(value, 3) for name, value in found.items()})
    return found


if __name__ == "__main__":
    main()
