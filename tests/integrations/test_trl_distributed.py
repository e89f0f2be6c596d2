"""TRL's trainers on two ranks: one process's losses; a loss outside the wrapper is seen."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl")

import torch
import trl_ranks as worker
from ranks import run_checks, run_ranks
from trl_runs import history

from prefkern.integrations import trl as ours

WORKER = worker.__file__


def one_process(folder, loss, **options):
    made = worker.trainer(ours.DPOTrainer, str(folder), loss, 4, **options)
    made.train()
    return made


def assert_same_log(got, want):
    assert len(got) == len(want) == worker.STEPS + 1
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "tdpo2"])
def test_two_ranks_are_one_process(tmp_path, loss):
    want = history(one_process(tmp_path, loss))
    run_ranks(tmp_path, WORKER, "ddp", 2, str(tmp_path), loss)
    assert_same_log(json.loads((tmp_path / f"{loss}.json").read_text()), want)


@pytest.mark.slow
def test_fsdp2_is_one_process(tmp_path):
    """Policy and reference sharded as accelerate shards them: losses, norms and final weights."""
    calls = [("fsdp", str(tmp_path), name) for name in worker.FSDP_CASES]
    found = run_checks(tmp_path, WORKER, 2, calls)
    assert not any(found.values()), found
    for name, case in worker.FSDP_CASES.items():
        want = one_process(tmp_path, **case)
        log, weights = torch.load(tmp_path / f"{name}.pt")
        assert_same_log(log, history(want))
        for parameter, value in want.model.named_parameters():
            assert torch.allclose(weights.pop(parameter), value, atol=2e-4), (name, parameter)
        assert not weights


@pytest.mark.slow
def test_a_loss_on_the_unwrapped_model_is_refused_and_seen(tmp_path):
    run_ranks(tmp_path, WORKER, "unwrapped", 2, str(tmp_path), "tdpo2")
