"""Online rounds: sampled answers, judged, made into what the loss reads; the scores go up."""

from __future__ import annotations

import json
import math

import pytest
import torch
from online_model import JUDGE, letters_model, write_rows
from tiny_models import config

from prefkern.cli.main import main
from prefkern.losses import resolve
from prefkern.prep import direction_prompts
from prefkern.train import models, train
from prefkern.train.recipes import rounds
from prefkern.train.recipes.answer_logps import answer_logps
from prefkern.train.recipes.online import answers as made_of
from prefkern.train.recipes.online import judges, round_data
from prefkern.train.recipes.online import rows as makers
from prefkern.train.recipes.online.makers import maker_of
from prefkern.train.recipes.online.sampling import Answer

PROMPTS = [{"prompt": f"{letter}:"} for letter in "pqrs"] * 4


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """(folder, model, prompts, judge file)"""
    folder = tmp_path_factory.mktemp("online")
    (folder / "judge.py").write_text(JUDGE)
    return (
        folder,
        letters_model(folder),
        write_rows(folder / "p.jsonl", PROMPTS),
        folder / "judge.py",
    )


def run(tmp_path, materials, **options):
    _, model, prompts, judge = materials
    base = dict(
        round_data="online", num_rounds=2, judge=f"{judge}:share_of_a", num_generations=4,
        max_new_tokens=10, max_steps=8, learning_rate=2e-3, per_device_train_batch_size=16,
    )  # fmt: skip
    prompts = options.pop("dataset", prompts)
    return train(config(tmp_path, model, prompts, **base | options))


def scores(result) -> list[float]:
    return [row["online/score"] for row in result["log_history"] if "online/score" in row]


def rows_of(tmp_path, number: int) -> list[dict]:
    lines = (tmp_path / f"round-{number}" / "data.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_prompts_of_another_name_and_what_stands_beside_them(tmp_path, materials, capfd):
    asked = [{"question": row["prompt"], "system": "Be brief."} for row in PROMPTS]
    data = write_rows(tmp_path / "q.jsonl", asked)
    common = dict(num_rounds=1, max_steps=1, dataset=data)
    run(tmp_path / "o", materials, columns={"prompt": "question"}, **common)
    assert "text that no prompt is given: 'system'" in capfd.readouterr().err
    assert {row["prompt"] for row in rows_of(tmp_path / "o", 0)} <= {"p:", "q:", "r:", "s:"}
    with pytest.raises(
        ValueError, match=r"\(its columns: 'question', 'system'\); --column prompt="
    ):
        run(tmp_path / "p", materials, **common)
    write_rows(tmp_path / "q.jsonl", [row | {"image": "a.png"} for row in PROMPTS])
    with pytest.raises(ValueError, match=r"q\.jsonl, row 1: column 'image' holds pictures"):
        run(tmp_path / "i", materials, **common)


def test_online_dpo_raises_what_the_judge_likes(tmp_path, materials):
    result = run(tmp_path, materials, num_rounds=3, round_reference="start")
    found = scores(result)
    assert 0.35 < found[0] < 0.65 and found[2] > found[0] + 0.15
    pairs = rows_of(tmp_path, 1)
    assert all(row["chosen_score"] > row["rejected_score"] for row in pairs)
    assert all(
        row["chosen"].count("a") / len(row["chosen"]) == row["chosen_score"] for row in pairs
    )
    assert rows_of(tmp_path, 0) != pairs  # sampled anew, from the model of the round before


def test_an_interrupted_round_keeps_its_answers(tmp_path, materials, monkeypatch):
    common = dict(max_steps=3, resume_from_checkpoint="auto", save_steps=2)
    whole = run(tmp_path / "whole", materials, **common)
    original, calls = rounds.train_run, []

    def interrupted(prepared, **options):
        calls.append(prepared)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(prepared, **options)

    monkeypatch.setattr(rounds, "train_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", materials, **common)
    monkeypatch.setattr(
        round_data.sampling, "sample_answers", None
    )  # would fail: nothing is sampled
    parts = run(tmp_path / "parts", materials, **common)
    assert scores(parts) == scores(whole)
    assert rows_of(tmp_path / "parts", 1) == rows_of(tmp_path / "whole", 1)
    losses = [[r["loss"] for r in x["log_history"] if "loss" in r] for x in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_ipo_md_samples_from_the_mixture(tmp_path, materials):
    """With the whole weight on the reference nothing the policy learns shows in its samples."""
    common = dict(
        loss=("ipo_md",), loss_args={"tau": 0.02}, round_reference="start", soft_judge=True,
        learning_rate=5e-3,
    )  # fmt: skip
    result = run(tmp_path / "mixed", materials, generation_mixture=0.125, **common)
    mixed = scores(result)
    frozen = scores(run(tmp_path / "frozen", materials, generation_mixture=1.0, **common))
    assert mixed[1] > mixed[0] + 0.25 and abs(frozen[1] - frozen[0]) < 0.2
    rows = rows_of(tmp_path / "mixed", 0)
    for row in rows:
        gap = row["chosen_score"] - row["rejected_score"]
        assert row["preference_prob"] == pytest.approx(1 / (1 + math.exp(-gap)))
    # margins are 0 at the first step (one batch holds all pairs): the loss is the judge's targets
    targets = [((row["preference_prob"] - 0.5) / 0.02) ** 2 for row in rows]
    first = next(row["loss"] for row in result["log_history"] if "loss" in row)
    assert first == pytest.approx(sum(targets) / len(targets), rel=1e-5)


@pytest.mark.parametrize("loss", ["soft_label", "selfie"])
def test_the_policys_own_reward_labels_its_samples(tmp_path, materials, loss):
    """OSP's soft strengths and Selfie's labels: no judge but the log-ratio to the start."""
    _, start, _, _ = materials
    trained = run(tmp_path / "first", materials, num_rounds=1)
    assert scores(trained)
    policy = str(tmp_path / "first")
    result = run(
        tmp_path / "own", (None, policy, materials[2], materials[3]), loss=(loss,),
        judge="implicit", judge_ref_model=start, keep_unfinished=True,
    )  # fmt: skip
    settings = config(tmp_path, start, "")
    one, other = (models.load_model(name, settings).eval() for name in (policy, start))
    tokenizer = models.load_tokenizer(start)
    for row in rows_of(tmp_path / "own", 0)[:3]:
        for side in ("chosen", "rejected"):
            a, b = (
                answer_logps(m, tokenizer, [row], [row[side]], settings)[0] for m in (one, other)
            )
            assert row[f"{side}_score"] == pytest.approx(0.1 * float((a - b).sum()), abs=1e-5)
        if loss == "soft_label":
            gap = row["chosen_score"] - row["rejected_score"]
            assert row["pref_prob"] == pytest.approx(1 / (1 + math.exp(-gap))) and gap > 0
    # what the first training liked is still what the model is driven to
    assert scores(result)[1] > scores(result)[0]


def test_fdpg_moves_the_policy_to_its_target(tmp_path, materials):
    found = scores(
        run(tmp_path, materials, loss=("fdpg",), target_beta=0.2, num_rounds=3, save_steps=8)
    )
    assert found[2] > found[0] + 0.15
    logt = torch.tensor([r["proposal_logp"] - r["log_target_prob"] for r in rows_of(tmp_path, 1)])
    baseline = (torch.nn.functional.softplus(-logt) - math.log(2)).mean().item()
    assert json.loads((tmp_path / "round-1" / "data.json").read_text())[
        "baseline"
    ] == pytest.approx(baseline, rel=1e-5)
    state = json.loads((tmp_path / "round-1" / "checkpoint-8" / "prefkern_state.json").read_text())
    assert state["config"]["loss_args"]["baseline"] == pytest.approx(baseline, rel=1e-5)


@pytest.mark.parametrize("loss", ["grpo", "rto"])
def test_policy_gradients_on_sampled_answers(tmp_path, materials, loss):
    aux = {}
    if loss == "rto":
        run(tmp_path / "dpo", materials, num_rounds=1)
        aux = dict(aux_model=str(tmp_path / "dpo"))
    found = scores(run(tmp_path / "run", materials, loss=(loss,), **aux))
    assert found[1] > found[0] + 0.08
    row = rows_of(tmp_path / "run", 0)[0]
    count = len(row["completion"]) + 1  # one token per byte, and the end
    assert len(row["old_logp"]) == count
    assert isinstance(row["advantages"], list) == (loss == "rto")


def test_directions_in_the_prompt_are_learned_by_rejection_sampling(tmp_path, materials):
    """DPA: the same prompts under two directions, the best answer of each imitated."""
    folder, model, _, judge = materials
    prompts = direction_prompts(
        PROMPTS[:4], [(1.0, 0.0), (0.0, 1.0)], objectives=("a", "b"), template="{weights}",
        separator="|",
    )  # fmt: skip
    assert prompts[0] == {"prompt": "a*100 + b*0|p:", "direction": [1.0, 0.0]}
    with pytest.raises(ValueError, match="length 1"):
        direction_prompts(PROMPTS[:1], [(1.0, 1.0)], objectives=("a", "b"))
    found = run(
        tmp_path, (folder, model, write_rows(folder / "d.jsonl", prompts), judge), loss=("sft",),
        judge=f"{judge}:by_direction", num_rounds=3, learning_rate=5e-3, max_new_tokens=16,
        keep_unfinished=True, max_steps=15, num_generations=8,
    )  # fmt: skip
    assert scores(found)[2] > scores(found)[0] + 0.1


def test_what_is_left_out_of_the_samples():
    rows = [{"prompt": "x", "chosen": "old"}, {"prompt": "y"}]
    answers = [
        [Answer("a", True), Answer("a", True), Answer("bb", False), Answer("ab", True)],
        [Answer(" ", True), Answer("c", True)],
    ]
    judge = judges.scorer_judge(lambda row, texts: [float(len(t)) for t in texts])
    lists, report = made_of.judged_lists(rows, answers, judge)
    assert lists == [{"prompt": "x", "completions": ["a", "ab"], "scores": [1.0, 2.0]}]
    assert report.counts == {
        "answers": 6, "repeated": 1, "cut off": 1, "blank": 1, "unusable": 0, "prompts": 1,
        "prompts without enough answers": 1,
    }  # fmt: skip
    assert report.score == 1.5
    with pytest.raises(ValueError, match="keep_unfinished"):
        made_of.judged_lists(rows[:1], [[Answer("a", False)] * 2], judge)
    with pytest.raises(ValueError, match="nothing is preferred"):
        makers.pair_rows(
            [{"prompt": "x", "completions": ["a", "b"], "scores": [1.0, 1.0]}], pairs="all"
        )


def test_cut_off_answers_are_trained_on_where_that_is_asked():
    answers = [[Answer("a", True), Answer("bb", False), Answer("bb", True)]]
    judge = judges.scorer_judge(lambda row, texts: [float(len(t)) for t in texts])
    lists, report = made_of.judged_lists([{"prompt": "x"}], answers, judge, keep_unfinished=True)
    assert lists == [{"prompt": "x", "completions": ["a", "bb"], "scores": [1.0, 2.0]}]
    assert report.counts["cut off"] == 0 and report.counts["repeated"] == 1


def test_answers_that_the_judge_cannot_use_are_left_out():
    """-inf: the second prompt then has one answer, which is enough for losses that imitate it."""
    rows = [{"prompt": "x"}, {"prompt": "y"}]
    answers = [[Answer(text, True) for text in texts] for texts in (("a", "?", "bb"), ("?", "c"))]

    def judge(rows, answers):
        return [[-math.inf if x == "?" else float(len(x)) for x in texts] for texts in answers]

    lists, report = made_of.judged_lists(rows, answers, judge)
    both = {"prompt": "x", "completions": ["a", "bb"], "scores": [1.0, 2.0]}
    assert lists == [both]
    assert report.counts["unusable"] == 2 and report.score == 1.5
    assert report.counts["prompts without enough answers"] == report.counts["prompts"] == 1
    lists, report = made_of.judged_lists(rows, answers, judge, least=1)
    assert lists == [both, {"prompt": "y", "completions": ["c"], "scores": [1.0]}]
    assert report.counts["prompts without enough answers"] == 0
    with pytest.raises(ValueError, match="no prompt has 2 answers to train on"):
        made_of.judged_lists(rows[1:], answers[1:], judge)


def test_samples_that_are_draws_keep_their_repetitions():
    """Pairs and lists want different answers; a policy gradient wants every draw."""
    rows, answers = [{"prompt": "x"}], [[Answer("a", True), Answer("a", True), Answer("b", True)]]
    judge = judges.scorer_judge(lambda row, texts: [float(t == "b") for t in texts])
    lists, _ = made_of.judged_lists(rows, answers, judge, distinct=False)
    assert lists[0]["completions"] == ["a", "a", "b"]
    made = makers.soft_pair_columns([1.0, 3.0, 1.0])
    assert made["pairs"] == [[1, 0], [1, 2]]
    assert made["pref_prob"] == pytest.approx([1 / (1 + math.exp(-2.0))] * 2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"judge": None}, "exactly one of judge"),
        ({"judge_model": "m"}, "exactly one of judge"),
        ({"judge": "implicit"}, "judge_ref_model"),
        ({"generation_temperature": 0.0}, "same answer every time"),
        ({"generation_mixture": 1.5}, r"\[0, 1\]"),
        ({"max_new_tokens": 64}, "leaves room"),
        ({"loss": ("kto",)}, "cannot make the rows"),
        ({"loss": ("dpo", "fdpg")}, "different rows"),
        ({"precomputed_ref": "c"}, "drop precomputed_ref"),
        ({"score_prompt": True}, "of the answers alone"),
        ({"aux_model": "m"}, "loss dpo reads no second frozen model"),
    ],
)
def test_contradictions_are_refused(tmp_path, materials, changes, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, materials, **changes)


@pytest.mark.parametrize(("name", "match"), [("same", "same score"), ("too_few", "per answer")])
def test_judges_that_do_not_judge(tmp_path, materials, name, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, materials, judge=f"{materials[3]}:{name}", max_steps=1)


def test_lists_and_the_command_line(tmp_path, materials, capsys):
    """OSP's soft pairs of a whole list, by flags; first what --dry-run says of it."""
    _, model, prompts, judge = materials
    flags = [
        "--model", model, "--dataset", prompts, "--output-dir", str(tmp_path / "out"),
        "--loss", "soft_pairs", "--round-data", "online", "--num-rounds", "2",
        "--judge", f"{judge}:share_of_a", "--num-generations", "4", "--max-new-tokens", "10",
        "--prompts-per-round", "6", "--max-steps", "6", "--learning-rate", "5e-3",
        "--device", "cpu", "--max-length", "64", "--save-steps", "0", "--no-plots",
        "--disable-tqdm", "--logging-steps", "6",
    ]  # fmt: skip
    assert main(["train", *flags, "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["prompts"] == 16 and shown["rows"] == "lists" and shown["rounds"] == 2
    assert main(["train", *flags]) == 0
    history = [
        json.loads(x) for x in (tmp_path / "out" / "log_history.jsonl").read_text().split("\n") if x
    ]
    found = scores({"log_history": history})
    assert found[1] > found[0] and len(rows_of(tmp_path / "out", 1)) <= 6
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_kinds():
    names = {
        "dpo": "pairs", "sft": "best answers", "lipo": "lists", "fdpg": "fdpg", "rto": "rto",
        "grpo": "advantages",
    }  # fmt: skip
    for name, kind in names.items():
        assert maker_of(config("out", "m", "d"), [resolve(name)[0]]).name == kind


@pytest.mark.parametrize(
    ("loss", "least", "distinct"),
    [
        ("dpo", 2, True), ("lipo", 2, True), ("sft", 1, True), ("grpo", 2, False),
        ("trpa", 2, False), ("fdpg", 1, False), ("rto", 1, False), ("oreo", 1, False),
        ("d2o_list", 1, False),
    ],
)  # fmt: skip
def test_what_a_prompt_needs_and_whether_a_repeated_answer_counts(loss, least, distinct):
    """A comparison needs two answers that differ; an estimate over draws needs every draw."""
    maker = maker_of(config("out", "m", "d"), [resolve(loss)[0]])
    assert (maker.least, maker.distinct) == (least, distinct)
