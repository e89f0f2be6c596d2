"""Rounds over the data: each starts from the last one's model, and the reference follows or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data

from prefkern.train import train
from prefkern.train.recipes import rounds
from prefkern.train.run import prepare


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    model = save_model(folder / "model")
    return model, write_data(folder / "pairs.jsonl"), write_data(folder / "lists.jsonl", "lists")


def open_lines(path) -> list[str]:
    return Path(path).read_text().splitlines()


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def first_margins(result) -> list[float]:
    """Margins at the first step of every round."""
    found = {}
    for row in result["log_history"]:
        if "rewards/margins" in row:
            found.setdefault(row["round"], row["rewards/margins"])
    return list(found.values())


def test_two_rounds_are_two_runs_in_a_row(tmp_path, materials):
    model, data, _ = materials
    common = dict(max_steps=2, eval_dataset=data)
    result = train(config(tmp_path / "rounds", model, data, num_rounds=2, **common))
    train(config(tmp_path / "one", model, data, **common))
    one = str(tmp_path / "one")
    train(config(tmp_path / "two", one, data, ref_model=one, seed=43, **common))
    assert equal(weights(tmp_path / "rounds" / "round-0"), weights(tmp_path / "one"))
    assert equal(weights(tmp_path / "rounds"), weights(tmp_path / "two"))
    # the previous model is the reference: margins start at exactly 0 in each round
    assert first_margins(result) == [0.0, 0.0]
    steps = [row["step"] for row in result["log_history"] if "loss" in row]
    assert steps == [1, 2, 3, 4] and result["round"] == 1 and result["step"] == 4
    lines = (tmp_path / "rounds" / "log_history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result["log_history"]


@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_reference_stays_or_follows(tmp_path, materials, lora_r):
    model, data, _ = materials
    common = dict(max_steps=2, num_rounds=2, lora_r=lora_r, learning_rate=1e-2)
    start = train(config(tmp_path / "start", model, data, round_reference="start", **common))
    follows = train(config(tmp_path / "follows", model, data, **common))
    assert first_margins(start)[1] > 0.0 and first_margins(follows)[1] == 0.0
    assert first_margins(start)[0] == first_margins(follows)[0] == 0.0


def test_extrapolation_between_rounds(tmp_path, materials):
    model, data, _ = materials
    result = train(
        config(tmp_path, model, data, max_steps=2, num_rounds=2, round_extrapolation=0.5)
    )
    start = load_file(f"{model}/model.safetensors")
    ended = [weights(tmp_path / f"round-{i}") for i in range(2)]
    ahead = [weights(tmp_path / f"round-{i}" / "extrapolated") for i in range(2)]
    for name, value in start.items():
        torch.testing.assert_close(ahead[0][name], ended[0][name] + 0.5 * (ended[0][name] - value))
        # the second line goes through where the two rounds ended, not through where they began
        expected = ended[1][name] + 0.5 * (ended[1][name] - ended[0][name])
        torch.testing.assert_close(ahead[1][name], expected)
    assert equal(weights(tmp_path), ahead[1])
    settings = json.loads((tmp_path / "round-1" / "log_history.jsonl").read_text().splitlines()[0])
    assert settings["rewards/margins"] == 0.0  # reference and start are both the extrapolated one
    assert first_margins(result) == [0.0, 0.0]


def test_curriculum_stages_move_the_reference_on(tmp_path, materials):
    model, _, lists = materials
    result = train(
        config(
            tmp_path, model, lists, num_rounds=0, round_data="stages", num_train_epochs=1.0,
            max_steps=-1, learning_rate=3e-3,
        )
    )  # fmt: skip
    stages = [
        [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
        for folder in sorted(tmp_path.glob("round-*"))
    ]
    assert len(stages) == 3 and [len(s) for s in stages] == sorted(map(len, stages), reverse=True)
    for number, stage in enumerate(stages):
        assert {row["stage"] for row in stage} == {number}
    # best against worst first, then the next worse: the gap of a prompt shrinks
    gaps = {row["prompt"]: row["gap"] for row in stages[0]}
    assert all(row["gap"] < gaps[row["prompt"]] for row in stages[1])
    assert first_margins(result) == [0.0, 0.0, 0.0]


def test_stages_of_the_data_themselves(tmp_path, materials):
    model, data, _ = materials
    rows = [json.loads(line) for line in open_lines(data)]
    staged = tmp_path / "staged.jsonl"
    lines = [json.dumps(row | {"stage": 1 - i % 2}) for i, row in enumerate(rows)]
    staged.write_text("".join(line + "\n" for line in lines))
    common = dict(round_data="stages", max_steps=1)
    train(config(tmp_path / "one", model, str(staged), num_rounds=1, **common))
    first = [json.loads(line) for line in open_lines(tmp_path / "one" / "round-0" / "data.jsonl")]
    assert [row["prompt"] for row in first] == [row["prompt"] for row in rows[1::2]]
    assert not (tmp_path / "one" / "round-1").exists()
    with pytest.raises(ValueError, match=r"needs a column stage .*, or ranked lists"):
        train(config(tmp_path / "none", model, data, num_rounds=0, **common))
    with pytest.raises(ValueError, match="num_rounds=3, but the data have 2 stages"):
        train(config(tmp_path / "three", model, str(staged), num_rounds=3, **common))
    shown = json.loads(
        rounds.describe_rounds(config(tmp_path, model, str(staged), **common | {"num_rounds": 0}))
    )
    assert shown["stages"] == [6, 6] and shown["rounds"] == 2


def test_an_interrupted_sequence_continues_to_the_same_bits(tmp_path, materials, monkeypatch):
    model, data, _ = materials
    common = dict(max_steps=3, num_rounds=3, save_steps=2, resume_from_checkpoint="auto")
    whole = train(config(tmp_path / "whole", model, data, **common))
    original, calls = rounds.train_run, []

    def interrupted(run, **options):
        calls.append(run)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(run, **options)

    monkeypatch.setattr(rounds, "train_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "parts", model, data, **common))
    parts = train(config(tmp_path / "parts", model, data, **common))
    assert len(calls) == 4  # the first round is not run again
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    losses = [[r["loss"] for r in x["log_history"] if "loss" in r] for x in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    with pytest.raises(ValueError, match="holds rounds of an earlier run"):
        train(config(tmp_path / "parts", model, data, num_rounds=3))
    with pytest.raises(ValueError, match="num_rounds: was 3, is 4"):
        train(config(tmp_path / "parts", model, data, **common | {"num_rounds": 4}))


def test_what_a_first_round_made_is_not_for_other_options(tmp_path, materials, monkeypatch):
    """Killed in its first round, the run leaves that round's data: of its own data set only."""
    model, data, lists = materials
    common = dict(round_data="stages", num_rounds=2, max_steps=1, resume_from_checkpoint="auto")

    def killed(run, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "train_run", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, model, lists, **common))
    assert (tmp_path / "round-0" / "data.jsonl").is_file()
    with pytest.raises(ValueError, match="dataset: was"):
        train(config(tmp_path, model, data, **common))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"precomputed_ref": "c"}, "those of one model on one data set"),
        ({"reference": "columns"}, "those of one model on one data set"),
        ({"reference": "adapter", "lora_r": 2}, "always the base model"),
        ({"round_extrapolation": 0.3, "lora_r": 2}, "product of two matrices"),
        ({"round_extrapolation": -0.1}, ">= 0"),
        ({"num_rounds": 0}, "round_data=stages"),
        ({"num_rounds": 1, "judge": "a:b"}, "set round_data=online"),
        ({"prompts_per_round": 4}, "prompts_per_round is for answers sampled in rounds"),
        ({"resume_from_checkpoint": "x/checkpoint-1"}, "resume_from_checkpoint=auto"),
    ],
)
def test_contradictions_are_refused(tmp_path, materials, changes, match):
    model, data, _ = materials
    with pytest.raises(ValueError, match=match):
        train(config(tmp_path, model, data, **{"num_rounds": 2} | changes))


def test_rounds_are_not_silently_one_run(tmp_path, materials):
    model, data, _ = materials
    with pytest.raises(ValueError, match=r"prefkern\.train\.train"):
        prepare(config(tmp_path, model, data, num_rounds=2))
    shown = json.loads(rounds.describe_rounds(config(tmp_path, model, data, num_rounds=2)))
    assert shown["rounds"] == 2 and shown["first_round"]["data"]["groups"] == 12
