"""What happens at which step: epochs, windows of the log, evaluations, checkpoints, rates."""

from __future__ import annotations

import json
from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from tiny_models import config, save_model, write_data

from prefkern.train import pairing, train
from prefkern.train.data_providers import Columns
from prefkern.train.loop import clip, count_steps, epoch_chunks, train_run
from prefkern.train.optimizer import make_optimizer
from prefkern.train.run import prepare


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counts")
    return save_model(folder / "model"), write_data(folder / "pairs.jsonl")  # 12 rows


def steps_of(result) -> list[dict]:
    return [row for row in result["log_history"] if "loss" in row]


def test_a_part_of_an_epoch_is_rounded_up(tmp_path, materials, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Columns, "begin_step", lambda self, examples, progress: seen.append(examples)
    )
    run = prepare(config(tmp_path, *materials, num_train_epochs=1.5, max_steps=-1))
    assert count_steps(run) == 5
    result = train_run(run)
    rows = steps_of(result)
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    assert result["epoch"] == pytest.approx(5 / 3) and result["step"] == 5
    tokens = [sum(example.num_tokens for example in examples) for examples in seen]
    assert [row["num_tokens"] for row in rows] == [sum(tokens[: i + 1]) for i in range(5)]
    order = [[example.row for example in examples] for examples in seen]
    first, second = [*chain(*order[:3])], [*chain(*order[3:])]
    assert sorted(first) == list(range(1, 13)) and len(set(second)) == 8
    assert first[:8] != second  # another order in the second epoch
    assert order[3:] == [[run.examples[i].row for i in chunk[0]] for chunk in
                         epoch_chunks(run, 1)[:2]]  # fmt: skip
    share = result["train_samples_per_second"] / result["train_steps_per_second"]
    assert share == pytest.approx(20 / 5)


def test_whole_epochs_and_max_steps(tmp_path, materials):
    for epochs, steps, want in ((2.0, -1, 6), (0.3, -1, 1), (9.0, 2, 2)):
        run = prepare(config(tmp_path, *materials, num_train_epochs=epochs, max_steps=steps))
        assert count_steps(run) == want
    run = prepare(config(tmp_path, *materials, gradient_accumulation_steps=2, max_steps=-1))
    assert [len(chunk) for chunk in epoch_chunks(run, 0)] == [2, 1] and count_steps(run) == 2


def test_the_log_is_a_mean_over_its_window(tmp_path, materials):
    common = dict(max_steps=5, eval_dataset=materials[1], eval_steps=2, save_steps=2)
    every = train(config(tmp_path / "every", *materials, **common))
    third = train(config(tmp_path / "third", *materials, logging_steps=3, **common))
    losses = [row["loss"] for row in steps_of(every)]
    assert [row["step"] for row in steps_of(third)] == [3, 5]
    means = [row["loss"] for row in steps_of(third)]
    assert means == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 2])
    for result in (every, third):
        assert result["train_loss"] == pytest.approx(sum(losses) / 5)
        steps = [row["step"] for row in result["log_history"] if "eval_loss" in row]
        assert steps == [0, 2, 4, 5]
    assert sorted(p.name for p in (tmp_path / "every").glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4",
    ]  # fmt: skip
    # the mean of margins is over the steps of the window too
    margins = [row["rewards/margins"] for row in steps_of(every)]
    found = steps_of(third)[0]["rewards/margins"]
    assert found == pytest.approx(sum(margins[:3]) / 3)


def test_the_logged_rate_is_the_one_of_the_step(tmp_path, materials):
    def rates(**options):
        result = train(
            config(
                tmp_path,
                *materials,
                max_steps=4,
                learning_rate=0.4,
                overwrite_output_dir=True,
                **options,
            )
        )
        return [row["learning_rate"] for row in steps_of(result)]

    assert rates() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert rates(warmup_steps=2) == pytest.approx([0.0, 0.2, 0.4, 0.2])
    assert rates(warmup_ratio=0.5) == pytest.approx([0.0, 0.2, 0.4, 0.2])
    assert rates(warmup_steps=1, warmup_ratio=0.5)[:2] == pytest.approx([0.0, 0.4])


def test_matrices_decay_and_nothing_else(tmp_path, materials):
    run = prepare(config(tmp_path, *materials, weight_decay=0.1, adam_beta2=0.99))
    optimizer = make_optimizer(run.step, run.config)
    names = {id(p): n for n, p in run.step.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay.keys() == {n for n, _ in run.step.named_parameters()}
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name else 0.1), name
    assert all(g["lr"] == 1e-3 and g["betas"] == (0.9, 0.99) for g in optimizer.param_groups)


def test_clipping():
    layer = torch.nn.Linear(2, 1, bias=False)
    for limit, want in ((1.0, 1.0), (0.0, 5.0), (9.0, 5.0)):
        layer.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip(Accelerator(cpu=True), layer, limit).item() == pytest.approx(5.0)
        assert layer.weight.grad.norm().item() == pytest.approx(want, rel=1e-5)


def test_resuming_refuses_another_packing_and_keeps_its_checkpoints(
    tmp_path, materials, monkeypatch
):
    common = dict(save_steps=2, resume_from_checkpoint="auto", overwrite_output_dir=True)
    train(config(tmp_path, *materials, max_steps=3, **common))
    with monkeypatch.context() as patch:
        patch.setattr(pairing, "choose_packing", lambda *_: False)
        with pytest.raises(ValueError, match=r"was trained on packed batches.*set packing=on"):
            train(config(tmp_path, *materials, max_steps=3, **common))
    again = train(config(tmp_path, *materials, max_steps=3, **common))
    assert [row["step"] for row in steps_of(again)] == [1, 2, 3]
    assert (tmp_path / "checkpoint-2").is_dir()
    saved = json.loads((tmp_path / "checkpoint-2" / "prefkern_state.json").read_text())
    assert (saved["step"], saved["step_in_epoch"], saved["groups"]) == (2, 2, 8)
    assert saved["tokens"] == steps_of(again)[1]["num_tokens"]
