"""TRL's trainers on two ranks: one process's losses; a loss outside the wrapper is seen."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl")

import trl_ranks as worker
from ranks import run_ranks
from trl_runs import history

from prefkern.integrations import trl as ours

WORKER = worker.__file__


def one_process(folder, loss):
    made = worker.trainer(ours.DPOTrainer, str(folder), loss, 4)
    made.train()
    return history(made)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "tdpo2"])
def test_two_ranks_are_one_process(tmp_path, loss):
    want = one_process(tmp_path, loss)
    run_ranks(tmp_path, WORKER, "ddp", 2, str(tmp_path), loss)
    got = json.loads((tmp_path / f"{loss}.json").read_text())
    assert len(got) == len(want) == worker.STEPS + 1
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.slow
def test_a_loss_on_the_unwrapped_model_is_refused_and_seen(tmp_path):
    run_ranks(tmp_path, WORKER, "unwrapped", 2, str(tmp_path), "tdpo2")
