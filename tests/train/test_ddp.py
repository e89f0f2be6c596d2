"""Two gloo ranks: they stay identical to the bit, and equal the single-process run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data

from prefkern.train.loop import train

WORKER = Path(__file__).resolve().parent / "ddp_worker.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_ranks(settings: Path, folder: Path) -> None:
    port, ranks = str(free_port()), []
    for rank in ("0", "1"):
        environment = os.environ | {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, str(WORKER), str(settings), str(folder)]
        ranks.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    for process in ranks:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output.decode()[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "layout", "rows"),
    [("tdpo2", "pairs", 12), ("sparsepo", "pairs", 11), ("kto", "unpaired", 12)],
)
def test_two_ranks_stay_equal_and_equal_one_process(tmp_path, loss, layout, rows):
    """11 rows in micro-batches of 2: the last step has one micro-batch too few, a rank fills in."""
    model = save_model(tmp_path / "model")
    data = write_data(tmp_path / "data.jsonl", layout, rows=rows)
    common = dict(
        loss=(loss,),
        per_device_train_batch_size=2,
        num_train_epochs=2.0,
        max_steps=-1,
        save_steps=2,
        learning_rate=1e-4,
        eval_dataset=data,
        weight_decay=0.1,
    )
    accumulate = 4 if loss != "kto" else 2
    one = train(
        config(tmp_path / "one", model, data, gradient_accumulation_steps=accumulate, **common)
    )["log_history"]
    settings = tmp_path / "two.json"
    two = config(
        tmp_path / "two", model, data, gradient_accumulation_steps=accumulate // 2, **common
    )
    settings.write_text(json.dumps(two.as_dict()))
    two_ranks(settings, tmp_path)
    first, second = (load_file(tmp_path / f"rank{r}.safetensors") for r in (0, 1))
    assert first.keys() == second.keys()
    assert all((first[k] == second[k]).all() for k in first), "ranks drifted apart"
    rows = [
        json.loads(line)
        for line in (tmp_path / "two" / "log_history.jsonl").read_text().splitlines()
    ]
    assert len(rows) == len(one)
    if loss == "kto":  # its baseline is a mean over the ranks' micro-batches: another estimate
        return
    for a, b in zip(one, rows, strict=True):
        for name in a.keys() & {
            "loss",
            "rewards/margins",
            "entropy",
            "eval_loss",
            "eval_rewards/accuracies",
        }:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
    alone, both = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in alone.items():
        assert (value - both[name]).abs().max() < 1e-5, name
