"""The trainer under DeepSpeed ZeRO-2 and ZeRO-3 on two gloo ranks: the losses, gradient norms and
weights of one process; checkpoints that any number of processes continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from many_processes import CASES, COMMON, assert_equal, rows_of, weights_of
from ranks import run_ranks
from tiny_models import config, save_model, write_data

from prefkern.train import seals, train

pytest.importorskip("deepspeed")
WORKER = str(Path(__file__).parents[1] / "train" / "sharded_ranks.py")
LONG = 400  # seconds, on a machine that much else runs on
LAUNCH = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  zero_stage: 3
  offload_optimizer_device: none
  offload_param_device: none
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: false
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name in one process and in two under each stage."""
    folder = tmp_path_factory.mktemp("zero")
    model, data = save_model(folder / "model"), write_data(folder / "pairs.jsonl", rows=11)
    tied = save_model(folder / "tied", tie_word_embeddings=True)

    def made(name: str, where: str, accumulate: int, **more):
        options = COMMON | CASES[name] | {"gradient_accumulation_steps": accumulate} | more
        own = tied if name == "tdpo2" else model
        return config(folder / where / name, own, data, eval_dataset=data, **options)

    def from_middle(name: str, where: str) -> dict:
        return {"resume_from_checkpoint": str(folder / where / name / "checkpoint-2")}

    for name in ("tdpo2", "masks", "lora"):
        train(made(name, "one", 4))
    for stage, every in (("zero2", {"masks": {}}), ("zero3", {"tdpo2": {}, "masks": {}})):
        lists = [(name, made(name, stage, 2, **more)) for name, more in every.items()]
        # the second half again, from the checkpoint in its middle; and of one process's run
        lists.append(("again", made("masks", f"{stage}-again", 2, **from_middle("masks", stage))))
        lists.append(("other", made("lora", f"{stage}-other", 2, **from_middle("lora", "one"))))
        for name, settings in lists:
            (folder / f"{name}.json").write_text(json.dumps(settings.as_dict()))
        names = [name for name, _ in lists]
        run_ranks(folder / stage, WORKER, "runs", 2, stage, str(folder), *names, seconds=LONG)
    return folder, made, from_middle


@pytest.mark.parametrize(("stage", "name"), [("2", "masks"), ("3", "masks"), ("3", "tdpo2")])
def test_two_ranks_are_one_process(runs, stage, name):
    folder, *_ = runs
    assert_equal(folder / "one" / name, folder / f"zero{stage}" / name)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_checkpoint_continues_to_the_same_bits(runs, stage):
    folder, *_ = runs
    before, again = (folder / where / "masks" for where in (f"zero{stage}", f"zero{stage}-again"))
    checkpoint = before / "checkpoint-2"
    assert len(list((checkpoint / "sharded").glob("*.safetensors"))) == 2
    assert seals.damage(checkpoint) is None
    first, second = weights_of(before), weights_of(again)
    assert first.keys() == second.keys() and len(first) > 20
    assert all((first[name] == second[name]).all() for name in first)
    logs = ([row["loss"] for row in rows_of(path) if "loss" in row] for path in (before, again))
    assert len(found := next(logs)) == 4 and found == next(logs)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_continue_what_one_process_began(runs, stage):
    folder, *_ = runs
    assert_equal(folder / "one/lora", folder / f"zero{stage}-other/lora")


@pytest.mark.parametrize("stage", ["2", "3"])
def test_one_process_continues_what_two_began(runs, stage):
    folder, made, from_middle = runs
    train(made("masks", f"alone{stage}", 4, **from_middle("masks", f"zero{stage}")))
    assert_equal(folder / "one/masks", folder / f"alone{stage}/masks")


@pytest.mark.slow
def test_accelerate_launch_with_its_own_file(tmp_path):
    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "pairs.jsonl", rows=11)

    def made(where: str, accumulate: int):
        options = COMMON | CASES["dpo"] | {"gradient_accumulation_steps": accumulate}
        return config(tmp_path / where, model, data, eval_dataset=data, **options)

    (tmp_path / "zero.yaml").write_text(LAUNCH)
    (tmp_path / "run.yaml").write_text(json.dumps(made("two", 2).as_dict()))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(tmp_path / "zero.yaml"), "-m", "prefkern", "train", "--config"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(tmp_path / "run.yaml")], env=environment, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    train(made("one", 4))
    assert_equal(tmp_path / "one", tmp_path / "two")
