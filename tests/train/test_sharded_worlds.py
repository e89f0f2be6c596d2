"""FSDP2 on three gloo ranks, on two groups of two that hold the same, and through online rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from many_processes import CASES, COMMON, assert_equal, rows_of, weights_of
from online_model import write_two_rounds
from ranks import run_ranks
from tiny_models import config, save_model, write_data

from prefkern.train import train

WORKER = str(Path(__file__).with_name("sharded_ranks.py"))
LONG = 400  # seconds, on a machine that much else runs on
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 3), ("hybrid", 4)])
def test_more_ranks_are_one_process_and_continue_to_the_same_bits(tmp_path, kind, world):
    """11 rows in micro-batches of 2: of four ranks two have none of their own in the second step,
    and three ranks do not divide the sizes of the weights."""
    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "pairs.jsonl", rows=11)

    def made(where: str, accumulate: int, **more):
        options = COMMON | CASES["masks"] | {"max_steps": 2, "save_steps": 1} | more
        options |= {"gradient_accumulation_steps": accumulate}
        return config(tmp_path / where, model, data, eval_dataset=data, **options)

    train(made("one", world))
    middle = {"resume_from_checkpoint": str(tmp_path / "many/checkpoint-1")}
    for name, more in (("many", {}), ("again", middle)):
        (tmp_path / f"{name}.json").write_text(json.dumps(made(name, 1, **more).as_dict()))
    run_ranks(
        tmp_path / "ranks", WORKER, "runs", world, kind, str(tmp_path), "many", "again",
        seconds=LONG,
    )  # fmt: skip
    assert_equal(tmp_path / "one", tmp_path / "many")
    first, again = (weights_of(tmp_path / where) for where in ("many", "again"))
    assert first.keys() == again.keys() and len(first) > 20
    assert all((first[name] == again[name]).all() for name in first)


def test_online_rounds(tmp_path):
    """Sharded training on answers that each rank samples for half of the prompts, with a reference
    that moves; the second round starts from the first one's gathered model."""
    write_two_rounds(tmp_path, "run.json")
    run_ranks(tmp_path / "ranks", WORKER, "trains", 2, "fsdp", str(tmp_path), "run", seconds=LONG)
    rows = rows_of(tmp_path / "out")
    sampled = [row for row in rows if "online/score" in row]
    assert [row["online/answers"] for row in sampled] == [60, 60]
    assert sampled[1]["online/score"] > sampled[0]["online/score"] + 0.1
    steps = [row for row in rows if "loss" in row]
    assert [row["rewards/margins"] == 0.0 for row in steps[::5]] == [True, True]
