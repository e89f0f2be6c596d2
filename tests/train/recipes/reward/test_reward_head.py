"""`--head reward`: a sequence-classification model through the losses of pairs and lists."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_commands import log_of, prefkern, rows_of, trained, write_lines
from tiny_models import config, save_model

from prefkern.cli.main import main
from prefkern.losses import LOSSES
from prefkern.prep import context_conditioned
from prefkern.train import train
from prefkern.train.evaluate import evaluate
from prefkern.train.loop import train_run
from prefkern.train.recipes.prepared import prepared_run as prepare
from prefkern.train.recipes.reward.model import load_reward_policy
from prefkern.train.stored.reward_model import load_reward_model

OPTIONS = dict(
    head="reward", max_steps=40, learning_rate=5e-3, per_device_train_batch_size=16, max_length=40,
)  # fmt: skip


def text(rng: random.Random, rate: float) -> str:
    return "".join("a" if rng.random() < rate else "b" for _ in range(6))


def pairs(seed: int, count: int = 64, **more) -> list[dict]:
    """The answer with more a is the better one."""
    rng = random.Random(seed)
    return [
        {"prompt": "p:", "chosen": text(rng, 0.8), "rejected": text(rng, 0.2)} | more
        for _ in range(count)
    ]


def swapped(rows: list[dict], **more) -> list[dict]:
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} | more for row in rows]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    save_model(folder / "model")
    write_lines(folder / "pairs.jsonl", pairs(0))
    write_lines(folder / "held_out.jsonl", pairs(1, 32))
    return folder


@pytest.fixture(scope="module")
def reward_model(given):
    """Trained from a causal model by the command."""
    out = given / "rm"
    trained(
        given / "model", given / "pairs.jsonl", out, head="reward", loss="bradley_terry",
        eval_dataset=given / "held_out.jsonl", max_steps=40, learning_rate=5e-3,
    )  # fmt: skip
    return out


def test_a_reward_model_from_a_causal_model(given, reward_model, tmp_path):
    accuracy, loss = (log_of(reward_model, f"eval_{x}") for x in ("rank/pair_accuracy", "loss"))
    assert accuracy[-1] > 0.9 and loss[-1] < 0.5 * loss[0]
    scored = tmp_path / "scored.jsonl"
    prefkern("score", dataset=given / "held_out.jsonl", output=scored, judge_model=reward_model,
             margin="gap")  # fmt: skip
    right = [row["gap"] > 0 for row in rows_of(scored)]
    # the command reads what training read: the same share of pairs
    assert sum(right) / len(right) == pytest.approx(accuracy[-1], abs=1e-6)
    found = [row["chosen_score"] for row in rows_of(scored)]
    assert sum(found) / len(found) == pytest.approx(log_of(reward_model, "eval_rewards/chosen")[-1],
                                                    abs=1e-3)  # fmt: skip


def test_a_step_is_the_losses_own(given, tmp_path):
    """The loss of the first batch by hand: the model's own logits of each text alone."""
    run = prepare(config(tmp_path, str(given / "model"), str(given / "pairs.jsonl"),
                         **OPTIONS | {"loss": ("bradley_terry",), "max_steps": 1,
                                      "per_device_train_batch_size": 64}))  # fmt: skip
    scores = []
    with torch.no_grad():
        for example in run.examples:
            for seq in example.sequences:
                ids = torch.tensor([seq.input_ids.tolist()])
                scores.append(run.step.policy(input_ids=ids).logits[0, 0])
    gap = torch.stack(scores).view(-1, 2)
    expected = torch.nn.functional.softplus(gap[:, 1] - gap[:, 0]).mean().item()
    log = train_run(run)["log_history"]
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert log[0]["rank/pair_accuracy"] == (gap[:, 0] > gap[:, 1]).double().mean().item()


@pytest.mark.parametrize("loss", ["dpo", "lipo"])
def test_losses_of_pairs_and_lists(given, tmp_path, loss):
    rows = [
        {"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]], "scores": [1, 0]}
        for r in rows_of(given / "pairs.jsonl")
    ]
    data = {"dpo": given / "pairs.jsonl", "lipo": write_lines(tmp_path / "l.jsonl", rows)}[loss]
    more = {"loss": (loss,), "loss_args": {"beta": 1.0}, "max_steps": 20}
    settings = config(tmp_path / "out", str(given / "model"), str(data), **OPTIONS | more)
    log = [row for row in train(settings)["log_history"] if "loss" in row]
    assert sum(row["loss"] for row in log[-5:]) < 0.7 * sum(row["loss"] for row in log[:5])
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]


def test_resume_and_adapter(given, tmp_path):
    common = dict(OPTIONS, loss=("bradley_terry",), max_steps=6, save_steps=3, lora_r=4)
    settings = config(
        tmp_path / "whole", str(given / "model"), str(given / "pairs.jsonl"), **common
    )
    found = [row["loss"] for row in train(settings)["log_history"] if "loss" in row]
    third = str(tmp_path / "whole" / "checkpoint-3")
    again = train(dataclasses.replace(settings, resume_from_checkpoint=third))
    assert [row["loss"] for row in again["log_history"] if "loss" in row] == found
    scored = tmp_path / "s.jsonl"
    prefkern("score", dataset=given / "held_out.jsonl", output=scored,
             judge_model=tmp_path / "whole")  # fmt: skip
    assert len({row["chosen_score"] for row in rows_of(scored)}) > 8


def test_adapters_that_do_not_fit(given, tmp_path):
    data, out = str(given / "pairs.jsonl"), tmp_path / "whole"
    common = dict(OPTIONS, loss=("bradley_terry",), max_steps=1, lora_r=4)
    train(config(out, str(given / "model"), data, **common))
    weights = load_file(out / "adapter_model.safetensors")
    del weights[next(name for name in weights if "lora_A" in name)]
    save_file(weights, out / "adapter_model.safetensors")
    again = config(tmp_path / "next", str(out), data, **common)
    with pytest.raises(ValueError, match="1 weights are not in"):
        prepare(again)
    with pytest.raises(ValueError, match="1 weights are not in"):
        load_reward_model(str(out), again)
    settings = json.loads((out / "adapter_config.json").read_text()) | {"task_type": "CAUSAL_LM"}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is an adapter of task CAUSAL_LM, and head=reward trains"):
        prepare(again)


def test_a_reward_model_is_trained_on_with_its_outputs(given, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    settings = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_labels=2,
    )  # fmt: skip
    made = LlamaForSequenceClassification(settings)
    made.save_pretrained(tmp_path / "two")
    common = dict(head="reward", loss=("bradley_terry",))
    found, drawn = load_reward_policy(config(tmp_path, str(tmp_path / "two"), "d", **common), None)
    assert drawn == [] and torch.equal(found.score.weight, made.score.weight)
    message = r"num_outputs=3, and .*two has 2 outputs; drop num_outputs\."
    with pytest.raises(ValueError, match=message):
        load_reward_policy(
            config(tmp_path, str(tmp_path / "two"), "d", num_outputs=3, **common), None
        )
    # scores of a causal model are new: one, or as many as are asked for
    for outputs in (None, 3):
        causal = config(tmp_path, str(given / "model"), "d", num_outputs=outputs, **common)
        found, drawn = load_reward_policy(causal, None)
        assert drawn == ["score.weight"] and found.score.weight.shape[0] == (outputs or 1)


def test_context_aware_pairs(given, tmp_path):
    """Under one context the answer with more a is better, under the other that with fewer."""
    rows = pairs(2, 48, context="A", context_rejected="B")
    data = write_lines(tmp_path / "c.jsonl", context_conditioned(rows, template="{context}"))
    held_out = write_lines(
        tmp_path / "h.jsonl",
        context_conditioned(pairs(3, 24, context="A", context_rejected="B"), template="{context}"),
    )
    accuracy = {}
    for name, train_on in (("aware", data), ("blind", tmp_path / "blind.jsonl")):
        if name == "blind":
            write_lines(train_on, [row | {"prompt": "p:"} for row in rows_of(data)])
        out = trained(
            given / "model", train_on, tmp_path / name, head="reward", loss="bradley_terry",
            eval_dataset=held_out, max_steps=40, learning_rate=5e-3,
        )  # fmt: skip
        accuracy[name] = log_of(out, "eval_rank/pair_accuracy")[-1]
    assert accuracy["aware"] > 0.85 and accuracy["blind"] < 0.65


def test_pal_places_users(given, tmp_path):
    """Two users who want the opposite: one score for all is right half of the time."""
    one = pairs(4, 48, user="ann")
    data = write_lines(tmp_path / "u.jsonl", [*one, *swapped(pairs(5, 48), user="bob")])
    held_out = write_lines(
        tmp_path / "h.jsonl", [*pairs(6, 16, user="ann"), *swapped(pairs(7, 16), user="bob")]
    )
    pal = trained(
        given / "model", data, tmp_path / "pal", head="reward", loss="pal", num_outputs=2,
        eval_dataset=held_out, max_steps=40, learning_rate=5e-3, prototype_learning_rate=0.1,
    )  # fmt: skip
    shared = trained(
        given / "model", data, tmp_path / "bt", head="reward", loss="bradley_terry",
        eval_dataset=held_out, max_steps=16, learning_rate=5e-3,
    )  # fmt: skip
    name = "eval_rank/pair_accuracy"
    assert log_of(pal, name)[-1] > 0.85 and log_of(shared, name)[-1] < 0.65
    # the points are saved with the model, and evaluation reads them
    more = {"loss": ("pal",), "num_outputs": 2}
    run = prepare(config(tmp_path / "e", str(pal), str(held_out), **OPTIONS | more), training=False)
    assert evaluate(run, run.examples)[name] == pytest.approx(log_of(pal, name)[-1])


def test_more_weighs_sources_by_the_gradients_of_each_step(given, tmp_path):
    """The first step's weights by hand: autograd at the head of the model's own forward, and the
    closed form of the shortest convex combination of two gradients."""
    rows = [*pairs(8, 24, source="large"), *swapped(pairs(9, 8), source="small")]
    data = write_lines(tmp_path / "m.jsonl", rows)
    more = {"loss": ("more",), "per_device_train_batch_size": 32, "max_steps": 6}
    run = prepare(config(tmp_path / "out", str(given / "model"), str(data), **OPTIONS | more))
    gradients = {}
    for name in ("large", "small"):
        scores = [
            run.step.policy(input_ids=torch.tensor([seq.input_ids.tolist()])).logits[0, 0]
            for example in run.examples
            if example.columns["source"] == name
            for seq in example.sequences
        ]
        better, worse = torch.stack(scores).view(-1, 2).T
        mean = torch.nn.functional.softplus(worse - better).mean()
        (gradients[name],) = torch.autograd.grad(mean, run.step.policy.score.weight)
    large, small = gradients["large"].flatten(), gradients["small"].flatten()
    apart = large - small
    expected = float((-(small @ apart) / (apart @ apart)).clamp(0.0, 1.0))  # of the large one
    log = [row for row in train_run(run)["log_history"] if "loss" in row]
    assert 0.1 < expected < 0.9
    assert log[0]["weights/large"] == pytest.approx(expected, abs=1e-3)
    assert all(row["weights/large"] + row["weights/small"] == pytest.approx(1.0) for row in log)
    assert len({row["weights/small"] for row in log}) > 4  # anew in every step


REFUSED = [
    (dict(loss="sft"), "adds a likelihood|has one score per answer"),
    (dict(loss="tdpo2"), "of a vocabulary, and a reward model has one score"),
    (dict(loss="kto"), "is pointwise, and a reward model has one score"),
    (dict(loss="dpo", ref_model="x"), "ref_model is of language models"),
    (dict(loss="dpo", num_outputs=2), "output_weights must have 2 numbers"),
    (dict(loss="pal"), "set num_outputs to its dimension"),
    (dict(loss="pal", num_outputs=2), "no row has a column 'user'"),
    (dict(loss="more"), "no row has a column 'source'"),
    (dict(loss="more", gradient_accumulation_steps=2), "those of a whole step"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_refusals(given, tmp_path, options, words):
    options = {k: (v,) if k == "loss" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=words):
        prepare(config(tmp_path / "o", str(given / "model"), str(given / "pairs.jsonl"),
                       **OPTIONS | options))  # fmt: skip
    assert not (tmp_path / "o").exists()


def test_a_loss_without_what_makes_it_itself(given, tmp_path, capsys):
    """Refused where it would be another method under the name, said where it is a lesser one."""
    with pytest.raises(ValueError, match="'pal' is its method only with --head reward"):
        prepare(config(tmp_path, "none", "none", loss=("pal",)))
    with pytest.raises(ValueError, match="num_outputs is of reward models"):
        config(tmp_path, "none", "none", num_outputs=2)
    said = {
        "d2o": "one stored answer per prompt",
        "mm_dpo": "a text stands in the place of the image",
        "oreo": "the value is a constant that nothing learns",
    }
    more = {"prompt_cond": "q:", "chosen_reward": 1.0, "rejected_reward": 0.0}
    more |= {"chosen_value": [0.0] * 7, "rejected_value": [0.0] * 7}
    data = write_lines(tmp_path / "d.jsonl", pairs(0, 4, **more))
    for name, words in said.items():
        # a column takes the place of the value head
        columns = {"value": "value"} if name == "oreo" else {}
        model = str(given / "model")
        prepare(config(tmp_path / name, model, str(data), loss=(name,), columns=columns))
        assert words in capsys.readouterr().err
    declared = {name for name, record in LOSSES.items() if record.parts}
    assert declared == {*said, "pal", "more"}


def test_dry_run(given, tmp_path, capsys):
    words = ["train", "--model", given / "model", "--dataset", given / "pairs.jsonl", "--dry-run",
             "--head", "reward", "--loss", "bradley_terry", "--device", "cpu", "--output-dir",
             tmp_path / "o", "--max-length", 64]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    found = capsys.readouterr()
    shown = json.loads(found.out)
    assert shown["outputs"] == 1 and shown["layout"] == "lists"
    assert "score.weight are drawn at random" in found.err
