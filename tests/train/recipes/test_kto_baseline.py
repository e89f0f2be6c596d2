"""kto's baseline: rows that are rotated by one, and their log-ratio."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import config, tiny_model

from prefkern.integrations.head import at_head
from prefkern.train.data import Encoded, Example, collate
from prefkern.train.recipes.kto_baseline import baseline_from, mismatch
from prefkern.train.reference import Reference


def unpaired(prompt: list[int], answer: list[int], row: int) -> Example:
    ids = np.array(prompt + answer, dtype=np.int32)
    return Example(row=row, sequences=(Encoded(ids, len(prompt)),), desirable=True)


def test_mismatched_completions_rotate_by_one():
    rows = [unpaired([1, 2], [3], 0), unpaired([4], [5, 6, 7], 1), unpaired([8], [9], 2)]
    made = mismatch(rows, rows[-1:] + rows[:-1], 4)
    assert [e.sequences[0].input_ids.tolist() for e in made] == [[1, 2, 9], [4, 3], [8, 5, 6, 7]]
    assert [e.sequences[0].completion_start for e in made] == [2, 1, 1]


@pytest.mark.parametrize("packed", [True, False])
def test_mismatched_logratio_against_full_logits(packed):
    policy, other = tiny_model("llama", 0), tiny_model("llama", 1)
    at_head(policy)
    at_head(other)
    rows = [
        unpaired([1, 2, 3], [4, 5], 0),
        unpaired([6, 7], [8, 9, 10], 1),
        unpaired([11], [12], 2),
    ]
    reference = Reference("model", config("out", "m", "d"), policy=policy, model=other)
    found = reference.logratio(
        collate(mismatch(rows, rows[-1:] + rows[:-1], 64), packed=packed, pad_id=0)
    )

    def logp(model, ids, start):
        with torch.no_grad():
            table = model(torch.tensor([ids.tolist()])).logits[0].log_softmax(-1)
        return sum(table[i - 1, ids[i]].item() for i in range(start, len(ids)))

    want = [
        logp(policy, s.input_ids, s.completion_start) - logp(other, s.input_ids, s.completion_start)
        for s in (e.sequences[0] for e in mismatch(rows, rows[-1:] + rows[:-1], 64))
    ]
    assert found.tolist() == pytest.approx(want, abs=1e-4)
    assert baseline_from(torch.tensor(-3.0)).item() == 0.0
    assert baseline_from(torch.tensor(2.5)).item() == 2.5
