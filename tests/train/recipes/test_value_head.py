"""The value head of OREO and RTO: it learns the reward, has a rate of its own, and resumes."""

from __future__ import annotations

import json

import pytest
import torch
from online_model import JUDGE, letters_model, write_rows
from safetensors.torch import load_file
from tiny_models import config, save_model

from prefkern.train import models, train
from prefkern.train.optimizer import make_optimizer
from prefkern.train.recipes import value_head
from prefkern.train.recipes.answer_logps import answer_logps
from prefkern.train.run import prepare

REWARD = {"p": 2.0, "q": -1.0}


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """(model, rows of answers whose reward is their prompt's)"""
    folder = tmp_path_factory.mktemp("value")
    rows = [
        {"prompt": f"{letter}:", "completion": f" {i}x", "reward": REWARD[letter]}
        for i in range(8)
        for letter in "pq"
    ]
    return save_model(folder / "model"), write_rows(folder / "rows.jsonl", rows)


def settings(folder, materials, **options):
    base = dict(loss=("oreo",), per_device_train_batch_size=16, value_learning_rate=0.1)
    return config(folder, *materials, **base | options)


def values(folder, model, config, prompt: str) -> torch.Tensor:
    policy = models.load_model(model, config).eval()
    head = value_head.build_head(str(folder), policy)
    read = lambda *given: value_head.token_values(head, *given)  # noqa: E731
    tokenizer = models.load_tokenizer(model)
    return answer_logps(policy, tokenizer, [{"prompt": prompt}], [" 3x"], config, read=read)[0]


def test_oreos_head_learns_the_reward_of_each_prompt(tmp_path, materials):
    run = settings(tmp_path, materials, max_steps=60, learning_rate=1e-5)
    log = train(run)["log_history"]
    # V = 0 and policy = reference: both residuals are the reward, and no KL
    assert log[0]["loss"] == pytest.approx(2 * (4.0 + 1.0) / 2, rel=1e-5)
    assert log[0]["value/mean"] == 0.0 and log[-2]["loss"] < 0.3
    for letter, reward in REWARD.items():
        found = values(tmp_path, str(tmp_path), run, f"{letter}:")
        assert found.mean().item() == pytest.approx(reward, abs=0.4)


def test_it_resumes_to_the_same_bits(tmp_path, materials):
    common = dict(max_steps=4, save_steps=2)
    train(settings(tmp_path / "whole", materials, **common))
    start = str(tmp_path / "whole" / "checkpoint-2")
    train(settings(tmp_path / "parts", materials, resume_from_checkpoint=start, **common))
    for name in (value_head.FILE, "model.safetensors"):
        whole, parts = ((tmp_path / x / name).read_bytes() for x in ("whole", "parts"))
        assert whole == parts
    stored = load_file(tmp_path / "whole" / value_head.FILE)
    assert stored["weight"].shape == (1, 32) and stored["weight"].abs().sum() > 0
    # a run from the trained model starts with its head
    again = prepare(settings(tmp_path / "again", (str(tmp_path / "whole"), materials[1])))
    assert torch.equal(again.step.trained()[value_head.NAME].weight, stored["weight"])


def test_a_rate_of_its_own_and_no_gradient_below_unless_asked(tmp_path, materials):
    for rate, flows in ((None, False), (0.25, True)):
        run = prepare(settings(tmp_path, materials, value_learning_rate=rate, value_gradient=flows))
        optimizer = make_optimizer(run.step, run.config)
        names = {id(p): n for n, p in run.step.named_parameters()}
        (own,) = (
            group
            for group in optimizer.param_groups
            if any(names[id(p)].startswith("value_head.") for p in group["params"])
        )
        assert len(own["params"]) == 2 and own["weight_decay"] == 0.0
        assert own["lr"] == (1e-3 if rate is None else rate)
        provider = next(p for p in run.providers if isinstance(p, value_head.ValueHeads))
        micro = run.micro_batch(run.examples[:2])
        hidden = torch.randn(*micro.batch.targets.shape, 32, requires_grad=True)
        torch.nn.init.ones_(provider.head.weight)
        provider.from_states(micro, hidden)["value"].sum().backward()
        assert (hidden.grad is not None) == flows


def test_a_column_takes_its_place(tmp_path, materials):
    run = prepare(
        config(
            tmp_path, materials[0],
            write_rows(
                tmp_path / "v.jsonl",
                [{"prompt": "p:", "completion": " x", "reward": 1.0, "v": [0.5, 0.5, 0.5]}] * 2,
            ),
            loss=("oreo",), columns={"value": "v"},
        )
    )  # fmt: skip
    assert value_head.NAME not in run.step.trained()


def test_a_critic_needs_both_of_its_targets(tmp_path, materials):
    with pytest.raises(ValueError, match=r"old_values is read from no column: --column old_values"):
        prepare(config(tmp_path, *materials, loss=("rto",), columns={"returns": "returns"}))


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    (folder / "judge.py").write_text(JUDGE)
    prompts = write_rows(folder / "p.jsonl", [{"prompt": f"{x}:"} for x in "pqrs"] * 4)
    return letters_model(folder), prompts, folder / "judge.py"


def online(folder, letters, **options):
    model, prompts, judge = letters
    base = dict(
        round_data="online", num_rounds=2, judge=f"{judge}:share_of_a", num_generations=4,
        max_new_tokens=10, max_steps=8, learning_rate=2e-3, per_device_train_batch_size=64,
        value_learning_rate=2e-2,
    )  # fmt: skip
    return train(config(folder, model, prompts, **base | options))


def scores(result) -> list[float]:
    return [row["online/score"] for row in result["log_history"] if "online/score" in row]


def test_rto_samples_with_the_values_of_the_round_before(tmp_path, letters):
    online(tmp_path / "dpo", letters, num_rounds=1, per_device_train_batch_size=16)
    result = online(
        tmp_path / "rto", letters, loss=("rto",), aux_model=str(tmp_path / "dpo"),
        loss_args={"beta1": 0.1, "lam": 0.9, "eps_clip": 0.3},
    )  # fmt: skip
    found = scores(result)
    assert found[1] > found[0] + 0.08
    first, second = (
        [json.loads(x) for x in (tmp_path / "rto" / f"round-{n}" / "data.jsonl").open()]
        for n in (0, 1)
    )
    assert all(v == 0.0 for row in first for v in row["old_values"])
    folder = tmp_path / "rto" / "round-0"
    row = second[0]
    run = config(tmp_path, str(folder), "")
    policy = models.load_model(str(folder), run).eval()
    head = value_head.build_head(str(folder), policy)
    want = answer_logps(
        policy, models.load_tokenizer(str(folder)), [row], [row["completion"]], run,
        read=lambda *given: value_head.token_values(head, *given),
    )[0]  # fmt: skip
    assert want.abs().sum() > 0
    assert row["old_values"] == pytest.approx(want.tolist(), abs=1e-6)
    state = json.loads((tmp_path / "rto" / "round-0" / "prefkern_run.json").read_text())
    assert state  # the round ended as a run of its own
    assert (tmp_path / "rto" / value_head.FILE).is_file()


def test_oreo_learns_from_its_own_answers_step_by_step(tmp_path, letters):
    """The judge's score is the reward; answers are split at the letter b."""
    result = online(
        tmp_path / "oreo", letters, loss=("oreo",), num_rounds=3, step_pattern="b",
        loss_args={"level": "step", "beta": 0.1}, max_steps=12, learning_rate=3e-3,
    )  # fmt: skip
    found = scores(result)
    assert found[2] > found[0] + 0.1


@pytest.mark.parametrize(
    ("loss_args", "match"),
    [
        ({"lam": 1.5}, r"lam must be in \[0, 1\], got 1.5"),
        ({"beta1": "much"}, "beta1 must be a number >= 0, got 'much'"),
        ({"dpo_reward_clip": -1.0}, "dpo_reward_clip must be a number >= 0"),
        ({"beta4": 1.0}, "no argument 'beta4'"),
    ],
)
def test_arguments_of_the_token_rewards_that_do_not_fit(tmp_path, letters, loss_args, match):
    with pytest.raises(ValueError, match=match):
        online(tmp_path, letters, loss=("rto",), aux_model=letters[0], loss_args=loss_args)
