"""Levels, self-samples beside a stored answer, several objectives, sampling within a run."""

from __future__ import annotations

import json
import statistics
from types import SimpleNamespace

import pytest
import torch
from online_model import letters_model, write_rows
from tiny_models import config, save_model

from prefkern.losses import LOSSES
from prefkern.train import train
from prefkern.train.recipes import rounds
from prefkern.train.recipes.online import judges, policy_gradient
from prefkern.train.recipes.online.answers import NothingToTrain, judged_lists
from prefkern.train.recipes.online.makers import maker_of
from prefkern.train.recipes.online.renewal import Renewal
from prefkern.train.recipes.online.sampling import Answer

JUDGE = """
def share(row, answers):
    return [text.count("a") / len(text) for text in answers]

def levels(row, answers):
    return [1 if "b" not in text else 2 if "a" in text else 3 for text in answers]

def both(row, answers):
    return [(text.count("a") / len(text), -0.1 * len(text)) for text in answers]

def uneven(row, answers):
    return [[1.0], *([1.0, 2.0] for _ in answers[1:])]

def broken(row, answers):
    return [float("nan")] * len(answers)
"""


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """(model, prompts with a rejected answer, judges)"""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "judge.py").write_text(JUDGE)
    rows = [{"prompt": f"{x}:", "rejected": y} for y in ("bb", "bab") for x in "pqrs"]
    return letters_model(folder), write_rows(folder / "p.jsonl", rows * 2), folder / "judge.py"


def run(folder, letters, judge="share", **options):
    model, prompts, file = letters
    base = dict(
        round_data="online", num_rounds=2, num_generations=4, max_new_tokens=10, max_steps=8,
        learning_rate=2e-3, per_device_train_batch_size=16,
        judge=None if judge is None else f"{file}:{judge}",
    )  # fmt: skip
    return train(config(folder, model, prompts, **base | options))


def rows_of(folder, number: int) -> list[dict]:
    return [json.loads(line) for line in (folder / f"round-{number}" / "data.jsonl").open()]


def logged(result, name: str) -> list[float]:
    return [row[f"online/{name}"] for row in result["log_history"] if f"online/{name}" in row]


def test_trpa_climbs_to_the_first_level(tmp_path, letters):
    found = logged(run(tmp_path, letters, "levels", loss=("trpa",)), "score")
    assert found[1] < found[0] - 0.15  # 1 is the best
    for row in rows_of(tmp_path, 0):
        assert row["scores"] == [-level for level in row["preference_levels"]]
        assert len(set(row["preference_levels"])) > 1
        sizes = [len(text) + 1 for text in row["completions"]]
        assert [len(x) for x in row["old_logp"]] == sizes


def test_d2o_leaves_the_stored_answers_behind(tmp_path, letters):
    """K samples a list against the stored answer, which is made of the letter b alone or nearly."""
    other = save_model(tmp_path / "other", seed=3)
    run(
        tmp_path / "out", letters, None, loss=("d2o_list",), rejected_ref_model=other,
        loss_args={"alpha": 1.0}, learning_rate=5e-3, max_steps=10,
    )  # fmt: skip
    rows = rows_of(tmp_path / "out", 0)
    assert all(row["scores"] == [1.0] * (len(row["scores"]) - 1) + [0.0] for row in rows)
    assert {row["completions"][-1] for row in rows} == {"bb", "bab"}

    def share(number: int) -> float:
        texts = [x for row in rows_of(tmp_path / "out", number) for x in row["completions"][:-1]]
        return sum(x in ("bb", "bab") for x in texts) / len(texts) + statistics.mean(
            x.count("b") / len(x) for x in texts
        )

    assert share(1) < share(0) - 0.05


def test_two_references_each_on_its_side(tmp_path, letters):
    from prefkern.train.reference import token_logps
    from prefkern.train.run import prepare

    other = save_model(tmp_path / "other", seed=3)
    pairs = [{"prompt": "p:", "chosen": "ab", "rejected": "b"}] * 2
    lists = [{"prompt": "p:", "completions": ["ab", "b", "aa"], "scores": [1, 0, 1]}] * 2
    for loss, rows in (("d2o", pairs), ("d2o_list", lists)):
        data = write_rows(tmp_path / f"{loss}.jsonl", rows)
        prepared = prepare(
            config(tmp_path, letters[0], data, loss=(loss,), rejected_ref_model=other)
        )
        micro = prepared.micro_batch(prepared.examples)
        reference, _ = prepared.constants(micro)
        provider = next(p for p in prepared.providers if hasattr(p, "other"))
        sides = [
            token_logps(model, micro.batch, prepared.config)
            for model in (prepared.reference.model, provider.other)
        ]
        bounds = micro.batch.cu_seqlens.tolist()
        best = [
            label == 1.0
            for e in prepared.examples
            for label in (e.relevance or (1.0, 0.0))
        ]  # fmt: skip
        for a, b, good in zip(bounds, bounds[1:], best, strict=False):
            assert torch.equal(reference.logp[0, a:b], sides[0 if good else 1][0, a:b])
        assert not torch.equal(*sides) and reference.states is None
    with pytest.raises(ValueError, match="compares both sides with one reference"):
        prepare(config(tmp_path, letters[0], data, loss=("dpo",), rejected_ref_model=other))


def test_advantages_of_several_objectives_by_hand():
    lists = [
        {"prompt": "x", "completions": ["a", "b", "c"], "scores": [0.0] * 3,
         "objectives": [[1.0, 10.0], [2.0, 0.0], [6.0, 5.0]]},
        {"prompt": "y", "completions": ["d", "e"], "scores": [0.0] * 2,
         "objectives": [[0.0, 1.0], [1.0, -1.0]]},
    ]  # fmt: skip
    logps = [torch.zeros(2)] * 5

    def standard(x: list[float]) -> list[float]:
        return [(v - statistics.mean(x)) / (statistics.stdev(x) + 1e-4) for v in x]

    weights, wanted, each = (0.5, 0.25), [], []
    for row in lists:
        columns = list(zip(*row["objectives"], strict=True))
        wanted += standard([sum(w * x for w, x in zip(weights, v, strict=True))
                            for v in row["objectives"]])  # fmt: skip
        parts = [standard(list(column)) for column in columns]
        each += [sum(w * p[i] for w, p in zip(weights, parts, strict=True))
                 for i in range(len(parts[0]))]  # fmt: skip
    for mode, want in (("sum_then_normalize", wanted), ("normalize_then_sum", standard(each))):
        rows = policy_gradient.rows_with_advantages(lists, logps, weights=weights, mode=mode)
        assert [row["advantages"] for row in rows] == pytest.approx(want, rel=1e-6)
        assert all("objectives" not in row for row in rows)


def test_grpo_follows_the_weights_of_two_objectives(tmp_path, letters):
    result = run(
        tmp_path, letters, "both", loss=("grpo",), judge_weights=(1.0, 2.0),
        judge_normalize="each", learning_rate=4e-3, max_steps=10, per_device_train_batch_size=64,
        num_generations=8,
    )  # fmt: skip
    score, letter, short = (logged(result, x) for x in ("score", "objective_1", "objective_2"))
    assert score[0] == pytest.approx(letter[0] + 2.0 * short[0])
    assert score[1] > score[0] + 0.1 and short[1] > short[0]


def test_a_reward_model_with_several_outputs(tmp_path, letters):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    small = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_labels=3,
    )  # fmt: skip
    folder = save_model(tmp_path / "rm")  # its tokenizer
    model = LlamaForSequenceClassification(small).eval()
    model.save_pretrained(folder)
    settings = config(
        tmp_path, letters[0], "", round_data="online", judge_model=folder,
        judge_weights=(1.0, 0.0, -1.0),
    )  # fmt: skip
    judge = judges.RewardModel(folder, settings, torch.device("cpu"))
    found = judge({"prompt": "p:"}, ["ab", "b"])
    ids = torch.tensor([judge.tokenizer("p:ab")["input_ids"]])
    assert found[0] == pytest.approx(model(input_ids=ids).logits[0].tolist(), rel=1e-5)
    assert [len(x) for x in found] == [3, 3]
    plain = config(tmp_path, letters[0], "", round_data="online", judge_model=folder)
    with pytest.raises(ValueError, match=r"has 3 output\(s\) and judge_weights is not given"):
        judges.RewardModel(folder, plain, torch.device("cpu"))


@pytest.mark.parametrize(
    ("judge", "options", "match"),
    [
        ("both", {}, "returns 2 numbers per answer and judge_weights has none"),
        ("both", {"judge_weights": (1.0,)}, "judge_weights has 1"),
        ("share", {"judge_weights": (1.0, 2.0)}, "the judge returns one number per answer"),
        ("uneven", {"judge_weights": (1.0, 2.0)}, "as many numbers for every answer"),
        ("broken", {}, "finite numbers, got nan"),
        ("share", {"loss": ("trpa",)}, r"whole numbers from 1 \(the best\), got 0"),
        ("share", {"judge_normalize": "each"}, "set judge_weights"),
        ("share", {"judge_normalize": "each", "judge_weights": (1.0,)}, "over advantages"),
        ("share", {"loss": ("d2o_list",)}, "drop judge"),
        (None, {}, "exactly one of judge"),
        ("share", {"sample_every": 2, "max_steps": -1}, "set max_steps"),
    ],
)
def test_judges_and_options_that_do_not_fit(tmp_path, letters, judge, options, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, letters, judge, **options)


def test_a_prompt_without_the_stored_answer_is_named(tmp_path, letters):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "p:"}])
    with pytest.raises(ValueError, match=r"row 0 of .* has no rejected, which loss d2o_list reads"):
        run(tmp_path / "out", (letters[0], prompts, letters[2]), None, loss=("d2o_list",))


def agree(monkeypatch, from_call: int) -> None:
    """From that sampling on every answer is the same."""
    from prefkern.train.recipes.online import round_data

    original, calls = round_data.sampling.sample_answers, []

    def sampled(policy, tokenizer, rows, **options):
        calls.append(rows)
        if len(calls) <= from_call:
            return original(policy, tokenizer, rows, **options)
        return [[Answer("a", True)] * options["num_generations"] for _ in rows]

    monkeypatch.setattr(round_data.sampling, "sample_answers", sampled)


def test_one_answer_is_enough_to_imitate(tmp_path, letters, monkeypatch):
    agree(monkeypatch, 0)
    result = run(tmp_path, letters, loss=("sft",), num_rounds=1)
    assert {row["completion"] for row in rows_of(tmp_path, 0)} == {"a"}
    losses = [row["loss"] for row in result["log_history"] if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("sampled", [0, 1])
def test_rounds_end_where_all_answers_agree(tmp_path, letters, monkeypatch, capsys, sampled):
    agree(monkeypatch, sampled)
    if not sampled:
        with pytest.raises(ValueError, match="no prompt has 2 answers to train on"):
            run(tmp_path, letters)
        return
    result = run(tmp_path, letters, num_rounds=3)
    assert "round 2: no prompt has 2 answers" in capsys.readouterr().err
    assert {row["round"] for row in result["log_history"]} == {0}
    model = (tmp_path / "model.safetensors").read_bytes()
    assert model == (tmp_path / "round-0" / "model.safetensors").read_bytes()


def test_a_judge_that_fails_later_leaves_the_rounds_before(tmp_path, letters, monkeypatch):
    original, calls = judges.scorer_judge, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 1:
            return original(*args)
        return original(lambda row, texts: [float("nan")] * len(texts), "mine")

    monkeypatch.setattr(rounds.__name__.rpartition(".")[0] + ".online.judges.scorer_judge", failing)
    with pytest.raises(ValueError, match=r"finite numbers, got nan. Rounds 1 to 1 are done, their"):
        run(tmp_path, letters)
    assert (tmp_path / "round-0" / "model.safetensors").is_file()


def test_sampling_within_a_run_keeps_model_and_optimizer(tmp_path, letters, monkeypatch):
    """grpo in one round whose answers are renewed every two steps; interrupted, the same bits."""
    common = dict(
        loss=("grpo",), num_rounds=1, sample_every=2, max_steps=8, save_steps=2,
        resume_from_checkpoint="auto", learning_rate=4e-3, per_device_train_batch_size=64,
    )  # fmt: skip
    whole = run(tmp_path / "whole", letters, **common)
    found = {row["step"]: row["online/score"] for row in whole["log_history"] if "loss" in row
             and "online/score" in row}  # fmt: skip
    assert found[3] == found[4] != found[5]  # of the samples that a step trains on
    assert found[8] > logged(whole, "score")[0] + 0.08
    state = tmp_path / "whole" / "round-0" / "checkpoint-6" / "optimizer.json"
    assert state.is_file() and (state.parent / "samples.jsonl").is_file()

    original = Renewal.renew

    def interrupted(self, step):
        if step == 4:
            raise KeyboardInterrupt
        return original(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Renewal, "renew", interrupted)
        run(tmp_path / "parts", letters, **common)
    run(tmp_path / "parts", letters, **common)
    files = [tmp_path / x / "model.safetensors" for x in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_samples_that_agree_within_a_run_are_told_and_passed_over(
    tmp_path, letters, monkeypatch, capsys
):
    agree(monkeypatch, 1)
    run(tmp_path, letters, num_rounds=1, sample_every=2, max_steps=4)
    assert "step 2: no prompt has 2 answers" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").is_file()


def test_every_sampling_has_a_number_of_its_own():
    asked, said = [], []

    def rows(number):
        asked.append(number)
        raise NothingToTrain("all alike.")

    settings = config("o", "m", "d")
    one = SimpleNamespace(num_processes=1, is_main_process=True)
    sampler = SimpleNamespace(config=SimpleNamespace(sample_every=2), accelerator=one, rows=rows)
    run = SimpleNamespace(config=settings, records=[], say=said.append)
    renewal = Renewal(sampler, run, first=10)
    assert not any(renewal.renew(step) for step in (1, 2, 2, 3, 4, 5, 8))
    assert asked == [11, 12, 14] and said[0].startswith("step 2: all alike.")
    # a run that goes on from a checkpoint
    again = Renewal(sampler, run, first=10)
    again.restore({"samplings": 2, "sampled": {"score": 0.5}})
    assert again.state() == {"samplings": 2, "sampled": {"score": 0.5}}
    assert {k: v.item() for k, v in again.metrics().items()} == {"online/score": 0.5}
    assert not again.renew(4) and not again.renew(6)
    assert asked[3:] == [13]


def test_vectors_are_weighed_where_answers_are_left_out():
    rows, answers = [{"prompt": "x"}], [[Answer("a", True), Answer("b", True)]]
    judge = judges.scorer_judge(lambda row, texts: [(1.0, 2.0), (3.0, -1.0)])
    lists, report = judged_lists(rows, answers, judge, weights=(1.0, 10.0))
    assert lists[0]["scores"] == [21.0, -7.0]
    assert lists[0]["objectives"] == [[1.0, 2.0], [3.0, -1.0]]
    assert report.objectives == [2.0, 0.5] and report.score == 7.0


def test_sft_takes_the_rows_of_the_loss_beside_it():
    settings = config("o", "m", "d")
    kinds = {
        ("sft",): "best answers", ("dpo", "sft"): "pairs", ("sft", "dpo"): "pairs",
        ("trpa",): "levels", ("d2o_list",): "samples and a stored answer", ("oreo",): "rewards",
    }  # fmt: skip
    for names, kind in kinds.items():
        assert maker_of(settings, [LOSSES[name] for name in names]).name == kind
