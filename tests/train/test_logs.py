"""Means of metrics: what each is a mean over, windows, processes, and where the rows go."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import config, tiny_model

from prefkern.train.data import Encoded, Example
from prefkern.train.logs import (
    History,
    Meter,
    Shares,
    is_share,
    postfix,
    total_flos,
    trainer_state,
)


def example(*lengths: int, **labels) -> Example:
    """Answers with so many scored tokens after a prompt of two."""
    sequences = tuple(Encoded(np.arange(2 + n, dtype=np.int32), 2) for n in lengths)
    return Example(row=0, sequences=sequences, **labels)


def means(*batches: tuple[dict[str, float], list[Example]]) -> dict[str, float]:
    meter = Meter()
    for metrics, examples in batches:
        meter.add_means({k: torch.tensor(v) for k, v in metrics.items()}, examples)
    return meter.pop()


def test_a_mean_over_pairs_counts_pairs_and_one_over_tokens_tokens():
    one, three = [example(4, 6)], [example(1, 1), example(2, 9), example(3, 2)]
    names = ("rewards/margins", "rewards/chosen", "logits/chosen", "logits/rejected", "entropy",
             "mean_token_accuracy")  # fmt: skip
    found = means((dict.fromkeys(names, 1.0), one), (dict.fromkeys(names, 5.0), three))
    assert found["rewards/margins"] == found["rewards/chosen"] == (1 + 3 * 5) / 4
    assert found["logits/chosen"] == found["mean_token_accuracy"] == (4 * 1 + 6 * 5) / 10
    assert found["logits/rejected"] == (6 * 1 + 12 * 5) / 18
    assert found["entropy"] == (10 * 1 + 18 * 5) / 28


def test_a_third_answer_is_in_no_metric_of_pairs():
    names = ("entropy", "mean_token_accuracy", "logits/rejected")
    one, two = [example(4, 6, 90)], [example(1, 9, 1)]
    found = means((dict.fromkeys(names, 1.0), one), (dict.fromkeys(names, 2.0), two))
    assert found["entropy"] == (10 * 1 + 10 * 2) / 20
    assert found["mean_token_accuracy"] == (4 + 1 * 2) / 5
    assert found["logits/rejected"] == (6 + 9 * 2) / 15


def test_single_answers_count_for_their_own_side():
    first = [example(3, desirable=True), example(5, desirable=True), example(7, desirable=False)]
    names = ("rewards/chosen", "rewards/rejected", "logits/chosen", "logits/rejected",
             "mean_token_accuracy", "entropy")  # fmt: skip
    second = [example(4, desirable=False)]
    found = means((dict.fromkeys(names, 1.0), first), (dict.fromkeys(names, 4.0), second))
    assert found["rewards/chosen"] == 1.0  # the second batch has no desirable answer
    assert found["rewards/rejected"] == (1 + 4) / 2
    assert found["logits/rejected"] == (7 * 1 + 4 * 4) / 11
    assert found["mean_token_accuracy"] == found["logits/chosen"] == 1.0  # of desirable answers
    assert found["entropy"] == (15 * 1 + 4 * 4) / 19


def test_lists_and_sequences_count_all_their_answers():
    names = ("mean_token_accuracy", "logits/mean", "logps/mean", "rank/ndcg", "rewards/chosen",
             "rewards/rejected")  # fmt: skip
    one = [example(1, 2, 3, relevance=(0.0, 1.0, 2.0))]
    two = [example(6, 6, relevance=(1.0, 0.0))]
    found = means((dict.fromkeys(names, 1.0), one), (dict.fromkeys(names, 2.0), two))
    assert found["mean_token_accuracy"] == found["logits/mean"] == (6 + 12 * 2) / 18
    assert found["logps/mean"] == (3 + 2 * 2) / 5
    assert found["rank/ndcg"] == found["rewards/chosen"] == 1.5
    assert found["rewards/rejected"] == (2 + 1 * 2) / 3
    # a loss without pairs or labels logs logps/mean: its accuracy is over all sequences
    pairs = [example(1, 5)], [example(3, 3)]
    plain = means(*((dict.fromkeys(names[:3], float(i)), e) for i, e in enumerate(pairs)))
    assert set(plain.values()) == {0.5}


def test_the_loss_and_its_terms_are_summed_over_a_step():
    """Two micro-batches of one step, then a step of one, then a batch that only keeps in step."""
    meter = Meter()
    for parts in ([(1.0, 0.5), (2.0, 0.25)], [(4.0, 1.0)]):
        shares = Shares()
        for loss, nll in parts:
            found = {"nll_loss": torch.tensor(nll), "rewards/margins": torch.tensor(9.0)}
            shares.add(torch.tensor(loss), found, real=True)
        shares.add(torch.tensor(math.nan), {"nll_loss": torch.tensor(5.0)}, real=False)
        shares.log(meter, world=2)
    # of two processes, each of which has its part
    assert meter.pop() == {"loss": 2 * (3.0 + 4.0) / 2, "nll_loss": 2 * (0.75 + 1.0) / 2}
    names = ("nll_loss", "penalty", "loss/dpo", "slow/loss", "rewards/margins", "logps/chosen")
    assert [is_share(name) for name in names] == [True] * 4 + [False] * 2


def test_a_window_starts_anew_after_its_row():
    meter = Meter({"loss": [6.0, 2.0]})  # as a checkpoint kept it
    meter.add("loss", 9.0, 2.0)
    assert meter.state() == {"loss": [24.0, 4.0]}
    assert meter.pop() == {"loss": 6.0}
    assert meter.pop() == {}
    meter.add("loss", torch.tensor(1.0))
    assert meter.pop() == {"loss": 1.0}


@pytest.fixture
def two_processes(monkeypatch):
    """This process beside one whose sums are the same."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def gather(everyone, mine):
        everyone[:] = [mine, {k: [2 * total, count] for k, (total, count) in mine.items()}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)


@pytest.mark.parametrize("keeps", [True, False])
def test_sums_of_all_processes_are_kept_by_one(two_processes, keeps):
    meter = Meter()
    meter.add("loss", 3.0, 1.0)
    meter.consolidate(keeps)
    assert meter.state() == ({"loss": [9.0, 2.0]} if keeps else {})


def test_a_mean_over_processes(two_processes):
    meter = Meter()
    meter.add("loss", 3.0, 2.0)
    assert meter.pop() == {"loss": (6.0 + 12.0) / 4.0}


def test_the_log_of_a_resumed_run_begins_with_the_rows_of_its_checkpoint(tmp_path):
    sent = []
    trackers = SimpleNamespace(trackers=[1], log=lambda values, step: sent.append((step, values)))
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')  # the second belongs to what did not happen
    history = History(path, [{"step": 1}], trackers)
    history.add({"loss": 0.5, "step": 2})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == history.rows == [{"step": 1}, {"loss": 0.5, "step": 2}]
    assert sent == [(2, {"loss": 0.5})]


def test_numbers_for_readers_of_transformers():
    model = tiny_model()
    inner = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    assert total_flos(model, 10) == 60.0 * inner
    row = {"loss": 0.123456, "rewards/accuracies": 0.5, "rewards/margins": 2.0, "epoch": 1.5}
    assert postfix(row) == {"loss": "0.1235", "acc": "0.5", "margin": "2"}
    state = trainer_state(config("o", "m", "d", num_train_epochs=1.5), 7, 9, 300, [row], 1e3)
    assert (state["global_step"], state["max_steps"], state["num_input_tokens_seen"]) == (7, 9, 300)
    assert state["num_train_epochs"] == 2 and state["epoch"] == 1.5 and state["total_flos"] == 1e3
