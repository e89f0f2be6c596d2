"""Runs that are made in one process and in several, and how two of them are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data

from prefkern.train import train
from prefkern.train.config import TrainConfig

# 13 rows in micro-batches of 2, four to a step: an epoch ends with three, and the second of two
# ranks has none of its own for its last
COMMON = dict(
    per_device_train_batch_size=2, max_steps=4, learning_rate=1e-3, weight_decay=0.1,
    max_grad_norm=0.5, save_steps=2,
)  # fmt: skip
CASES = {
    "dpo": dict(loss=("dpo",)),
    "tdpo2": dict(loss=("tdpo2",)),
    "masks": dict(loss=("sparsepo",), loss_args={"l1_norm_param_u": 1e-3}, mask_learning_rate=1e-2),
    "lora": dict(loss=("tdpo2",), lora_r=4, lora_target_modules=("q_proj", "lm_head")),
    "moves": dict(loss=("dpo",), sync_ref_model=True, ref_model_sync_steps=2),
}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log_history.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict:
    return {
        f"{file.name}:{name}": value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_equal(one: Path, two: Path, last: int = 99) -> None:
    """To rounding: every number of the last rows, every weight."""
    for a, b in zip(rows_of(one)[-last:], rows_of(two)[-last:], strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if name.startswith("perf/") or "runtime" in name or "_per_second" in name:
                continue
            assert b[name] == pytest.approx(value, rel=2e-5, abs=2e-6), (name, a["step"])
    alone, both = weights_of(one), weights_of(two)
    assert alone.keys() == both.keys() and alone
    for name, value in alone.items():
        assert (value - both[name]).abs().max() < 1e-5, name


def launched_as_one(folder: Path, settings: str, case: str) -> None:
    """A run that `accelerate launch` starts with the file `settings` is that of one process."""
    model, data = save_model(folder / "model"), write_data(folder / "pairs.jsonl", rows=13)

    def made(where: str, accumulate: int) -> TrainConfig:
        options = COMMON | CASES[case] | {"gradient_accumulation_steps": accumulate}
        return config(folder / where, model, data, eval_dataset=data, **options)

    (folder / "accelerate.yaml").write_text(settings)
    (folder / "run.yaml").write_text(json.dumps(made("two", 2).as_dict()))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(folder / "accelerate.yaml"), "-m", "prefkern", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "--config", str(folder / "run.yaml")], env=environment, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    train(made("one", 4))
    assert_equal(folder / "one", folder / "two")
