"""Evaluation: means over the held-out rows whatever the batches, and a policy left as it was."""

from __future__ import annotations

import json
import math

import pytest
from tiny_models import config, save_model, write_data

from prefkern.train.data_providers import Columns
from prefkern.train.evaluate import evaluate
from prefkern.train.run import prepare

TIMES = ("eval_runtime", "eval_samples_per_second")


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    files = {}
    for layout in ("pairs", "lists", "unpaired"):
        path = folder / f"{layout}.jsonl"
        files[layout] = write_data(path, layout, rows=7, seed=3)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        more = {"chosen_advantages": 1.0, "rejected_advantages": -0.5}  # for grpo
        path.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    other = save_model(folder / "reference", seed=1)
    return save_model(folder / "model", attention_dropout=0.3), other, files


def run_of(tmp_path, materials, layout="pairs", **options):
    model, other, files = materials
    return prepare(
        config(
            tmp_path / "out", model, files[layout], ref_model=other, disable_dropout=False,
            **options,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "layout"),
    [
        (("tdpo2",), "pairs"), (("orpo",), "pairs"), (("dpo", "sft"), "pairs"),
        (("grpo",), "pairs"), (("distill",), "pairs"), (("lipo",), "lists"), (("pro",), "lists"),
        (("bco",), "unpaired"),
    ],
)  # fmt: skip
def test_the_size_of_the_batches_changes_nothing(tmp_path, materials, loss, layout):
    """7 rows at once, and in batches of 3, 3 and 1."""
    found = []
    for size in (7, 3):
        run = run_of(
            tmp_path, materials, layout, per_device_eval_batch_size=size,
            per_device_train_batch_size=2, loss=loss,
        )  # fmt: skip
        found.append(evaluate(run, run.examples))
    assert found[0].keys() == found[1].keys()
    for name in found[0].keys() - {*TIMES, "eval_rewards/margins"}:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5, abs=1e-6), name
    if layout != "unpaired":  # there a margin is a difference of the means of one batch
        name = "eval_rewards/margins"
        assert found[0].get(name, 0.0) == pytest.approx(found[1].get(name, 0.0), rel=1e-5, abs=1e-6)
    assert ("eval_length_baseline" in found[0]) == (layout != "unpaired")
    assert all(math.isfinite(value) for value in found[0].values())


def test_no_dropout_in_evaluation_and_the_mode_comes_back(tmp_path, materials):
    run = run_of(tmp_path, materials)
    first, second = (evaluate(run, run.examples)["eval_loss"] for _ in range(2))
    assert first == second and run.step.training
    run.step.eval()
    evaluate(run, run.examples)
    assert not run.step.training


def test_an_evaluation_is_one_step(tmp_path, materials, monkeypatch):
    seen = []

    def begin_step(self, examples, progress):
        seen.append((len(examples), progress))

    monkeypatch.setattr(Columns, "begin_step", begin_step)
    run = run_of(tmp_path, materials, per_device_eval_batch_size=4, per_device_train_batch_size=1)
    evaluate(run, run.examples)
    assert seen == [(7, None)]
