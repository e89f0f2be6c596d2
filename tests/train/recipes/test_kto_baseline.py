"""kto's baseline: rows that are rotated by one, and their log-ratio."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import config, tiny_model

from prefkern.integrations.head import at_head
from prefkern.losses import LOSSES
from prefkern.train.data import Encoded, Example, collate
from prefkern.train.processes import Processes
from prefkern.train.providers import Micro, Opened
from prefkern.train.recipes.kto_baseline import KtoBaseline, baseline_from, mismatch
from prefkern.train.reference import Reference


def unpaired(prompt: list[int], answer: list[int], row: int) -> Example:
    ids = np.array(prompt + answer, dtype=np.int32)
    return Example(row=row, sequences=(Encoded(ids, len(prompt)),), desirable=True)


def test_mismatched_completions_rotate_by_one():
    rows = [unpaired([1, 2], [3], 0), unpaired([4], [5, 6, 7], 1), unpaired([8], [9], 2)]
    made = mismatch(rows, rows[-1:] + rows[:-1], 4)
    assert [e.sequences[0].input_ids.tolist() for e in made] == [[1, 2, 9], [4, 3], [8, 5, 6, 7]]
    assert [e.sequences[0].completion_start for e in made] == [2, 1, 1]


def test_mismatched_rows_are_cut_at_max_length():
    rows = [unpaired([1, 2], [3], 0), unpaired([4], [5, 6, 7], 1)]
    made = mismatch(rows, rows[::-1], 3)
    assert [e.sequences[0].input_ids.tolist() for e in made] == [[1, 2, 5], [4, 3]]


def test_the_baseline_is_the_mean_over_a_micro_batch_of_a_steps_rows():
    """The log-ratio of a row is the sum of its ids here."""
    rows = [unpaired([1, 2], [3], 0), unpaired([4], [5, 6, 7], 1), unpaired([8], [9], 2)]
    sums = SimpleNamespace(logratio=lambda batch: batch.input_ids.sum(1).double())
    settings = config("out", "m", "d", loss=("kto",), max_length=3)
    provider = KtoBaseline(settings, [LOSSES["kto"]])
    provider.open(
        Opened(
            policy=None, reference=sums, examples=rows, packed=False, pad_id=0,
            device=torch.device("cpu"), processes=Processes(None), training=True, resume=None,
            say=print, frozen=str,
        )
    )  # fmt: skip

    def baseline(*examples):
        return provider.arguments(Micro(list(examples), None), None)["kl_baseline"].item()

    provider.begin_step(rows, 0.0)
    assert baseline(*rows[:2]) == ((1 + 2 + 9) + (4 + 3)) / 2
    assert baseline(rows[2]) == 8 + 5 + 6
    provider.begin_step(rows[1:2], None)  # alone in its step: the row before it in the data
    assert baseline(rows[1]) == 4 + 3
    provider.begin_step(rows[:1], None)
    assert baseline(rows[0]) == 1 + 2 + 9


def test_no_prompt_is_compared_where_prompts_are_scored():
    settings = config("out", "m", "d", loss=("kto",))
    KtoBaseline(settings, [LOSSES["kto"]]).check()
    scored = KtoBaseline(replace(settings, score_prompt=True), [LOSSES["sft"], LOSSES["kto"]])
    with pytest.raises(ValueError, match=r"loss 'kto' compares .* drop score_prompt\."):
        scored.check()


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
