"""A step that is no number ends the run before the weights, and before any file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data

from prefkern.objective.metrics import rank_stats
from prefkern.train import finite, loop, train
from prefkern.train.config import TrainConfig
from prefkern.train.evaluate import evaluate
from prefkern.train.optimizer import rounded_away
from prefkern.train.output import list_checkpoints
from prefkern.train.processes import Processes
from prefkern.train.run import prepare

ALONE = Processes(SimpleNamespace(num_processes=1))


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("materials")
    return save_model(folder / "model"), write_data(folder / "pairs.jsonl")


def poisoned(monkeypatch, at: int, value: float) -> None:
    """What one overflow in the backward of step `at` does to a gradient."""
    original, calls = loop.clip, [0]

    def clip(accelerator, root, limit):
        calls[0] += 1
        if calls[0] == at:
            next(p for p in root.parameters() if p.grad is not None).grad.view(-1)[0] = value
        return original(accelerator, root, limit)

    monkeypatch.setattr(loop, "clip", clip)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_gradient_that_is_no_number(tmp_path, materials, monkeypatch, value, limit):
    poisoned(monkeypatch, 4, value)
    options = dict(
        max_steps=9, logging_steps=9, save_steps=1, save_total_limit=2, max_grad_norm=limit
    )
    with pytest.raises(
        ValueError, match=r"gradient norm became (nan|inf).*step 4, rows .*checkpoi"
    ):
        train(config(tmp_path, *materials, **options))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    for path in list_checkpoints(tmp_path):
        assert all(v.isfinite().all() for v in load_file(path / "model.safetensors").values())


def test_the_last_step_writes_no_model(tmp_path, materials, monkeypatch):
    poisoned(monkeypatch, 3, math.nan)
    with pytest.raises(ValueError, match=r"at step 3.*there is no whole checkpoint"):
        train(config(tmp_path, *materials, max_steps=3, logging_steps=3))
    assert not (tmp_path / "model.safetensors").exists()


def test_before_a_weight_has_moved_no_learning_rate_is_to_blame(tmp_path, materials):
    asked = config(tmp_path, *materials, loss_args={"beta": 1e30}, max_steps=1)
    with pytest.raises(ValueError, match=r"step 1, rows .*: no weight has moved yet, so look at"):
        train(asked)


def test_a_run_that_moves_no_weight_is_no_result(tmp_path, materials):
    """A gradient clipped to 1e-30 is not 0, and no fp32 weight sees it."""
    with pytest.raises(ValueError, match=r"no weight changed.*max_grad_norm 1e-30 are lost"):
        train(config(tmp_path, *materials, max_grad_norm=1e-30, max_steps=2))
    assert not (tmp_path / "model.safetensors").exists()
    net = torch.nn.Linear(3000, 9, bias=False)
    before = finite.sampled(net)
    assert [len(values) for values in before] == [27000 // 3]  # every third of them
    with torch.no_grad():
        net.weight.view(-1)[300] += 1e-3
    finite.check_moved(net, before, config("o", "m", "d"), ALONE)


def test_weights_that_are_no_numbers_are_not_written(tmp_path, materials, monkeypatch):
    original = loop.Loop._one_step

    def one_step(self, *args):
        original(self, *args)
        with torch.no_grad():
            next(self.run.step.parameters()).view(-1)[3] = math.inf

    monkeypatch.setattr(loop.Loop, "_one_step", one_step)
    with pytest.raises(ValueError, match="is not finite after step 1 and is not written"):
        train(config(tmp_path, *materials, max_steps=1))
    assert not (tmp_path / "model.safetensors").exists()


def test_evaluation_of_broken_weights_is_no_result(tmp_path, materials):
    run = prepare(config(tmp_path, *materials, loss=("simpo",)), training=False)
    with torch.no_grad():
        next(run.step.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"evaluation gives no numbers \(eval_.* nan"):
        evaluate(run, run.examples)


FLOATS = [f.name for f in dataclasses.fields(TrainConfig) if isinstance(f.default, float)]


@pytest.mark.parametrize("name", [*FLOATS, "loss_args", "loss_weights"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_options_are_numbers(name, value):
    given = {"loss_args": {"beta": value}, "loss_weights": (value,)}.get(name, value)
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        config("o", "m", "d", **{name: given})


def lists(path: Path, scores: list[float]) -> str:
    row = {"prompt": "q", "responses": [f" {c}" for c in "abc"], "scores": scores}
    path.write_text("".join(json.dumps(row | {"prompt": f"q{i}"}) + "\n" for i in range(4)))
    return str(path)


@pytest.mark.parametrize("scores", [[0, 50, 100], [-3.5, 0, 2], [1, 2, 31]])
def test_labels_that_gains_were_not_made_for(tmp_path, materials, scores):
    data, common = lists(tmp_path / "lists.jsonl", scores), dict(loss=("lipo",), max_steps=1)
    run = prepare(config(tmp_path / "a", materials[0], data, **common))
    assert "only their order is used; --list-labels scores" in str(run.report)
    assert all(sorted(example.relevance) == [0.0, 1.0, 2.0] for example in run.examples)
    small = lists(tmp_path / "small.jsonl", [0, 1, 2])
    assert prepare(config(tmp_path / "a", materials[0], small, **common)).report.notes == []
    with pytest.raises(ValueError, match="labels of dataset and eval_dataset are on two scales"):
        prepare(config(tmp_path / "a", materials[0], small, eval_dataset=data, **common))
    before = load_file(Path(materials[0]) / "model.safetensors")
    train(config(tmp_path / "b", materials[0], data, list_labels="order", **common))
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert any(not torch.equal(before[k], after[k]) for k in before)
    asked = config(tmp_path / "c", materials[0], data, list_labels="scores", **common)
    if max(scores) > 64:
        with pytest.raises(ValueError, match=r"became inf.*--list-labels order"):
            train(asked)
    else:
        train(asked)
    # losses that read the order alone take any scale
    train(config(tmp_path / "d", materials[0], data, **common | {"loss": ("plackett_luce",)}))
    row = json.loads((tmp_path / "d" / "log_history.jsonl").read_text().splitlines()[0])
    assert 0.0 <= row["rank/ndcg"] <= 1.0


def test_ndcg_of_large_labels():
    cu, scores = torch.tensor([0, 3]), torch.tensor([0.0, 1.0, 2.0])
    small = rank_stats(scores, torch.tensor([3.0, 2.0, 0.0]), cu).ndcg
    gains = torch.tensor([7.0, 3.0, 0.0], dtype=torch.float64)
    discount = 1 / torch.log2(torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(
        small, ((gains.flip(0) * discount).sum() / (gains * discount).sum())[None]
    )
    # 2^5000 has no double; the ratio has
    large = rank_stats(scores, torch.tensor([5000.0, 4999.0, 0.0]), cu).ndcg
    want = (0.5 * discount[1] + discount[2]) / (1 + 0.5 * discount[1])
    torch.testing.assert_close(large, want[None])


def test_bfloat16_weights_that_cannot_move_are_told(tmp_path, materials, capfd):
    layer = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.5], [1e-4, 1e-5]]))
    assert rounded_away(layer, 1e-4) == 0.0  # fp32
    assert rounded_away(layer.bfloat16(), 1e-4) == 0.5
    # the bound itself: 1 and an update of 1/512 round back to 1, one of 1/256 does not
    one = torch.ones((), dtype=torch.bfloat16)
    assert one - 1 / 512 != one or one + 1 / 512 == one
    for options, told in (({}, True), ({"learning_rate": 1e-2}, False)):
        common = dict(dtype="bfloat16", max_steps=1, learning_rate=1e-6) | options
        train(config(tmp_path / str(told), *materials, **common))
        said = capfd.readouterr().err
        assert ("--dtype float32 --bf16 keeps fp32 weights" in said) == told


def test_a_run_without_a_gradient_is_no_result(tmp_path, materials):
    rows = [json.loads(line) for line in Path(materials[1]).read_text().splitlines()]
    data = tmp_path / "muted.jsonl"
    data.write_text("".join(json.dumps(row | {"weight": 0}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="every gradient of the run was 0, so nothing was trained"):
        train(config(tmp_path / "out", materials[0], str(data)))
    assert not (tmp_path / "out" / "model.safetensors").exists()
