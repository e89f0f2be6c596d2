"""`prefkern precompute` on two gloo ranks: the file of one process, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from safetensors import safe_open
from tiny_models import config, save_model, write_data

from prefkern.train.precompute import precompute

WORKER = str(Path(__file__).with_name("sharded_ranks.py"))


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_write_what_one_process_does(tmp_path, kind, one_thread):
    """5 held-out rows in batches of 2: a rank has one batch too few, the last one has one row."""
    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "pairs.jsonl", rows=12)
    held_out = write_data(tmp_path / "held.jsonl", rows=5)

    def made(where: str):
        more = {"eval_dataset": held_out, "per_device_eval_batch_size": 2}
        return config(tmp_path / where, model, data, **more)

    one = precompute(made("one"))
    (tmp_path / "run.json").write_text(json.dumps(made("two").as_dict()))
    run_ranks(tmp_path / "ranks", WORKER, "precomputes", 2, kind, str(tmp_path), "run", seconds=300)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(p.name for p in one)
    for path in one:
        with safe_open(path, "pt") as a, safe_open(tmp_path / "two" / path.name, "pt") as b:
            assert a.metadata() == b.metadata()
            for name in ("logp", "cu_seqlens"):
                assert (a.get_tensor(name) == b.get_tensor(name)).all(), name
            assert len(a.get_tensor("logp")) > 20
