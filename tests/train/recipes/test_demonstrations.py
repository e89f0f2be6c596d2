"""BiAlign end to end: a teacher ranks subsets of demonstrations, a student learns both."""

from __future__ import annotations

import math

import pytest
import torch
from online_model import write_rows
from tiny_models import config, save_model

from prefkern.train import models, train
from prefkern.train.recipes.answer_logps import answer_logps
from prefkern.train.recipes.demonstrations import teacher_lists
from prefkern.train.run import prepare

ROWS = [
    {
        "demonstrations": ["a1", "b2", {"prompt": "c", "completion": "3"}, "d4"],
        "prompt": f"{letter}", "completion": f" {number}",
    }
    for number, letter in enumerate("pqrs")
]  # fmt: skip


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """(student, teacher, lists, where they are)"""
    folder = tmp_path_factory.mktemp("bialign")
    student, teacher = (save_model(folder / f"m{seed}", seed=seed) for seed in (0, 4))
    settings = config(folder, teacher, "")
    lists = teacher_lists(
        ROWS, models.load_model(teacher, settings).eval(), models.load_tokenizer(teacher),
        settings, separator="|",
    )  # fmt: skip
    return student, teacher, lists, write_rows(folder / "lists.jsonl", lists)


def test_lists_hold_the_teachers_own_scores(materials, tmp_path):
    _, teacher, lists, _ = materials
    settings = config(tmp_path, teacher, "")
    model, tokenizer = models.load_model(teacher, settings).eval(), models.load_tokenizer(teacher)
    for row, made in zip(ROWS, lists, strict=True):
        assert made["prompts"][0] == f"a1|b2|c3|d4|{row['prompt']}"
        assert made["scores"][0] is None and len(set(made["prompts"])) == 5
        for text, score in zip(made["prompts"][1:], made["scores"][1:], strict=True):
            assert set(text.split("|")) <= {"a1", "b2", "c3", "d4", row["prompt"]}
            logp = answer_logps(model, tokenizer, [{"prompt": text}], [row["completion"]], settings)
            assert score == pytest.approx(float(logp[0].double().sum()), rel=1e-6)


def test_the_student_ranks_and_predicts_as_its_teacher(materials, tmp_path):
    student, teacher, _, data = materials
    settings = config(
        tmp_path / "out", student, data, loss=("bialign",), ref_model=teacher,
        likelihood_prompt=True, max_steps=40, learning_rate=1e-2,
    )  # fmt: skip
    run = prepare(settings)
    first = run.examples[0]
    assert math.isnan(first.relevance[0]) and len(first.sequences) == 5
    starts = [s.completion_start for s in first.sequences]
    assert starts[0] == len("a1|b2|c3|d4|p") and len(set(starts)) > 1
    batch = run.micro_batch([first]).batch
    wide = (batch.likelihood_targets != -100).sum() - (batch.targets != -100).sum()
    assert wide == starts[0] - 1  # the demonstrations of the first sequence, but their first token
    log = train(settings)["log_history"]
    assert log[-2]["loss"] < 0.5 * log[0]["loss"]


def test_rows_that_cannot_be_ranked_are_named(materials, tmp_path):
    settings = config(tmp_path, materials[1], "")
    call = (None, None, settings)
    with pytest.raises(ValueError, match="row 0 must hold prompt, completion and a list"):
        teacher_lists([{"prompt": "x", "completion": "y"}], *call)
    one = [{"demonstrations": ["a"], "prompt": "x", "completion": "y"}]
    with pytest.raises(ValueError, match="too few for 4 different subsets"):
        teacher_lists(one, *call)
    with pytest.raises(ValueError, match="at least 2"):
        teacher_lists(one, *call, subsets=1)
    with pytest.raises(ValueError, match="shots must be in 1 to 1"):
        teacher_lists(one, *call, shots=2)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompts": ["x"]}, "must hold 2 entries"),
        ({"scores": [None, 1.0]}, "all equal"),
        ({"prompts": ["x", "x"], "completions": ["a", "a"]}, "with another score"),
    ],
)
def test_lists_with_prompts_of_their_own_are_checked(materials, tmp_path, change, match):
    row = {"prompts": ["x", "y"], "completions": ["a", "b"], "scores": [1.0, 0.0]} | change
    data = write_rows(tmp_path / "d.jsonl", [row])
    with pytest.raises(ValueError, match=match):
        prepare(config(tmp_path, materials[0], data, loss=("bialign",), ref_model=materials[1]))
