"""The trainer under DeepSpeed ZeRO-2 and ZeRO-3 on two gloo ranks: the losses, gradient norms and
weights of one process; checkpoints that any number of processes continues."""

from __future__ import annotations

import json
import math
from pathlib import Path
from shutil import which

import pytest
from many_processes import CASES, COMMON, assert_equal, launched_as_one, rows_of, weights_of
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data

from prefkern.train import seals, train
from prefkern.train.evaluate import evaluate
from prefkern.train.precompute import precompute
from prefkern.train.run import prepare

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
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


CHECKED = {2: ("masks",), 3: ("tdpo2", "masks")}  # runs from start to end under each stage


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Runs of one process, and what every run is made of."""
    folder = tmp_path_factory.mktemp("zero")
    model, data = save_model(folder / "model"), write_data(folder / "pairs.jsonl", rows=13)
    tied = save_model(folder / "tied", tie_word_embeddings=True)

    def made(name: str, where: str, accumulate: int, middle: str = "", **more):
        """`middle`: the folder of the runs whose checkpoint it continues."""
        options = COMMON | CASES[name] | {"gradient_accumulation_steps": accumulate} | more
        if middle:
            options["resume_from_checkpoint"] = str(folder / middle / name / "checkpoint-2")
        own = tied if name == "tdpo2" else model
        return config(folder / where / name, own, data, eval_dataset=data, **options)

    for name in ("tdpo2", "masks", "lora"):
        train(made(name, "one", 4))
    return folder, made


@pytest.fixture(scope="module")
def two_ranks(start):
    """The folder after two ranks have run everything under a stage; one start of them for all."""
    folder, made = start
    done: set[int] = set()

    def run(stage: int):
        where = f"zero{stage}"
        if stage not in done:
            done.add(stage)
            lists = [(name, made(name, where, 2)) for name in CHECKED[stage]]
            # the second half again, from the checkpoint in its middle; and of one process's run
            lists.append(("again", made("masks", f"{where}-again", 2, middle=where)))
            lists.append(("other", made("lora", f"{where}-other", 2, middle="one")))
            for name, settings in lists:
                (folder / f"{name}.json").write_text(json.dumps(settings.as_dict()))
            names = [name for name, _ in lists]
            run_ranks(folder / where, WORKER, "runs", 2, where, str(folder), *names, seconds=LONG)
        return folder, where, made

    return run


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_are_one_process(two_ranks, stage):
    folder, where, _ = two_ranks(stage)
    for name in CHECKED[stage]:
        assert_equal(folder / "one" / name, folder / where / name)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_continues_to_the_same_bits(two_ranks, stage):
    folder, where, _ = two_ranks(stage)
    before, again = folder / where / "masks", folder / f"{where}-again" / "masks"
    checkpoint = before / "checkpoint-2"
    assert len(list((checkpoint / "sharded").glob("*.safetensors"))) == 2
    assert seals.damage(checkpoint) is None
    first, second = weights_of(before), weights_of(again)
    assert first.keys() == second.keys() and len(first) > 20
    assert all((first[name] == second[name]).all() for name in first)
    logs = ([row["loss"] for row in rows_of(path) if "loss" in row] for path in (before, again))
    assert len(found := next(logs)) == 4 and found == next(logs)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_continue_what_one_process_began(two_ranks, stage):
    folder, where, _ = two_ranks(stage)
    assert_equal(folder / "one/lora", folder / f"{where}-other/lora")


@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_continues_what_two_began(two_ranks, stage):
    folder, where, made = two_ranks(stage)
    train(made("masks", f"{where}-alone", 4, middle=where))
    assert_equal(folder / "one/masks", folder / f"{where}-alone/masks")


def test_precompute_writes_what_one_process_does(start):
    folder, made = start
    one, two = made("dpo", "one-cache", 4), made("dpo", "two-cache", 4)
    (folder / "cache.json").write_text(json.dumps(two.as_dict()))
    run_ranks(
        folder / "cache", WORKER, "precomputes", 2, "zero3", str(folder), "cache", seconds=LONG
    )
    for path in precompute(one):
        found = load_file(Path(two.output_dir) / path.name)
        assert all((found[name] == value).all() for name, value in load_file(path).items())


def test_evaluation_is_one_process(start):
    """Of two models that are both shared out, neither of them trained."""
    folder, made = start
    settings = made("dpo", "evaluated", 4, ref_model=str(folder / "tied"))
    run = prepare(settings, training=False)
    one = evaluate(run, run.examples)
    (folder / "eval.json").write_text(json.dumps(settings.as_dict()))
    run_ranks(folder / "eval", WORKER, "evaluates", 2, "zero3", str(folder), "eval", seconds=LONG)
    two = json.loads((folder / "eval-metrics.json").read_text())
    assert one.keys() == two.keys() and one["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)
    for name in one.keys() - {"eval_runtime", "eval_samples_per_second"}:
        assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name


@pytest.mark.skipif(which("c++") is None, reason="DeepSpeed compiles its collectives on a CPU")
def test_accelerate_launch_with_its_own_file(tmp_path):
    launched_as_one(tmp_path, LAUNCH, "dpo")
