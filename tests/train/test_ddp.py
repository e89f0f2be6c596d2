"""Two gloo ranks: they stay identical to the bit, and equal the single-process run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from online_model import write_two_rounds
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data
from torch.distributed import TCPStore

from prefkern.train import train

WORKER = Path(__file__).resolve().parent / "ddp_worker.py"


def two_ranks(settings: Path, folder: Path) -> None:
    # The store binds its port itself and keeps it, as torchrun's does: a port that is free when it
    # is asked for may be another's when the ranks come to it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[subprocess.Popen] = []
    for rank in ("0", "1"):
        environment = os.environ | {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            # both ranks are on this machine: no network interface can come between them
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        }
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, str(WORKER), str(settings), str(folder)]
        # a file, not a pipe: a full pipe would stop the rank that nobody reads
        with (folder / f"rank{rank}.txt").open("w") as output:
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + 240
    try:
        # A rank that fails leaves the other one waiting: the first failure ends both.
        while any(process.poll() is None for process in ranks):
            assert all(process.poll() in (None, 0) for process in ranks), told(folder)
            assert time.monotonic() < deadline, f"still running after 240 s\n{told(folder)}"
            time.sleep(0.05)
        assert all(process.returncode == 0 for process in ranks), told(folder)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def told(folder: Path) -> str:
    return "\n".join((folder / f"rank{rank}.txt").read_text()[-4000:] for rank in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "layout", "rows"),
    [("tdpo2", "pairs", 12), ("sparsepo", "pairs", 13), ("kto", "unpaired", 12)],
)
def test_two_ranks_stay_equal_and_equal_one_process(tmp_path, loss, layout, rows):
    """13 rows in micro-batches of 2: the last step has one micro-batch too few, a rank fills in."""
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


def test_two_ranks_train_an_adapter_on_the_head_as_one_process(tmp_path):
    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "data.jsonl", rows=8)
    common = dict(
        loss=("tdpo2",), lora_r=4, lora_target_modules=("q_proj", "lm_head"), learning_rate=1e-3,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    train(config(tmp_path / "one", model, data, per_device_train_batch_size=4, **common))
    two = config(tmp_path / "two", model, data, per_device_train_batch_size=2, **common)
    settings = tmp_path / "two.json"
    settings.write_text(json.dumps(two.as_dict()))
    two_ranks(settings, tmp_path)
    first, second = (load_file(tmp_path / f"rank{r}.safetensors") for r in (0, 1))
    assert all((first[k] == second[k]).all() for k in first), "ranks drifted apart"
    alone, both = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")
    )
    assert any("lm_head.lora_B" in name for name in alone)
    for name, value in alone.items():
        assert (value - both[name]).abs().max() < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "rows", "accumulate", "updates"),
    [(("bco",), 10, 1, 3), (("beta_dpo", "lcpo", "selfie"), 9, 3, 3)],
    ids=["bco", "beta_dpo-lcpo-selfie"],
)
def test_states_of_two_ranks_are_those_of_one_process(tmp_path, losses, rows, accumulate, updates):
    """Two ranks with 2 rows each update a state as one process with 4.

    10 rows: a rank fills in with the other's own batch. 9 rows in one step: it fills in with the
    step's first batch, which has more rows than the last one.
    """
    model = save_model(tmp_path / "model")
    layout = "unpaired" if "bco" in losses else "pairs"
    data = write_data(tmp_path / "data.jsonl", layout, rows=rows)
    common = dict(
        loss=losses, num_train_epochs=2.0, max_steps=-1, learning_rate=1e-3,
        save_steps=updates // accumulate, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    one = config(tmp_path / "one", model, data, per_device_train_batch_size=4, **common)
    two = config(tmp_path / "two", model, data, per_device_train_batch_size=2, **common)
    alone = train(one)["log_history"]
    settings = tmp_path / "two.json"
    settings.write_text(json.dumps(two.as_dict()))
    two_ranks(settings, tmp_path)
    weights = [load_file(tmp_path / f"rank{r}.safetensors") for r in (0, 1)]
    assert all((weights[0][k] == weights[1][k]).all() for k in weights[0]), "ranks drifted apart"
    log = (tmp_path / "two" / "log_history.jsonl").read_text().splitlines()
    for a, b in zip(alone, map(json.loads, log), strict=True):
        for name in (n for n in a if n == "loss" or n.startswith("state/")):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
    file = f"checkpoint-{common['save_steps']}/prefkern_state.json"
    saved = [json.loads((tmp_path / d / file).read_text())["losses"] for d in ("one", "two")]
    assert saved[0]["updates"] == saved[1]["updates"] == updates * len(losses)
    flat = [json.dumps(s, default=str) for s in saved]
    numbers = [[float(x) for x in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)] for text in flat]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-7)


@pytest.mark.slow
def test_online_rounds_on_two_ranks(tmp_path):
    """Each rank answers half of the prompts; the processes stay together over the rounds."""
    write_two_rounds(tmp_path, "settings.json")
    two_ranks(tmp_path / "settings.json", tmp_path)
    lines = (tmp_path / "out" / "log_history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    sampled = [row for row in rows if "online/score" in row]
    assert [row["online/answers"] for row in sampled] == [60, 60]
    assert sampled[1]["online/score"] > sampled[0]["online/score"] + 0.1
    # a prompt's pair answers that prompt: the ranks' answers came back in the order of the rows
    pairs = (tmp_path / "out" / "round-0" / "data.jsonl").read_text().splitlines()
    given = iter([f"{x}:" for x in "pqrst"] * 3)
    assert all(json.loads(line)["prompt"] in given for line in pairs) and len(pairs) > 5
    steps = [row for row in rows if "loss" in row]
    assert [row["rewards/margins"] == 0.0 for row in steps[::5]] == [True, True]
