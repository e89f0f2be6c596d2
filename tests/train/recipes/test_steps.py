"""Answers split into steps, and Tree-TPO's cosines from the policy's own states."""

from __future__ import annotations

import math
import re

import pytest
import torch
from online_model import write_rows
from tiny_models import config, save_model
from tiny_tokenizer import byte_tokenizer

from prefkern.losses.weights import step_cosine
from prefkern.train import models, train
from prefkern.train.recipes.steps import StepCosine, StepIndex, step_index
from prefkern.train.run import prepare

STEPS = "Step [0-9]:"


def numbered(text: str, pattern: str, tokenizer=None) -> str:
    tokenizer = tokenizer or byte_tokenizer()
    tokens = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    return "".join(str(int(x)) for x in step_index(tokens, decode, re.compile(pattern)))


def test_where_steps_begin():
    # a match begins a step, what stands before the first is one of its own, the end is the last's
    assert numbered("ab#c#d", "#") == "1122333"
    assert numbered("#c#d", "#") == "11222"
    assert numbered("  #c", "#") == "11111"  # nothing but blanks before the first
    # of white space alone it is the end of the step before
    assert numbered("ab\n\nc\n\n", r"\n\n") == "11112222"
    assert numbered("none", "#") == "11111"
    # a token of several characters belongs to the step of its first one
    joined = byte_tokenizer((("b", "#"), ("#", "c")))
    assert numbered("ab#c#cd", "#", joined) == "112333"


def rows(tmp_path, **more) -> str:
    answers = [
        "Step 1: aa Step 2: bb", "Step 1: aa Step 2: zz", "Step 1: qq Step 2: bb Step 3: c",
    ]  # fmt: skip
    table = [
        {"prompt": f"{i}:", "responses": [f" {x}{i}" for x in answers], "scores": [2.0, 1.0, 0.0]}
        for i in range(4)
    ]
    return write_rows(tmp_path / "lists.jsonl", [row | more for row in table])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("steps") / "m")


def test_tree_tpos_cosines_are_of_the_policys_states(tmp_path, model):
    """Against the hidden states that transformers returns for each answer alone."""
    run = prepare(config(tmp_path, model, rows(tmp_path), loss=("tree_tpo",), step_pattern=STEPS))
    micro = run.micro_batch(run.examples[:2])
    _, given = run.constants(micro)
    provider = next(p for p in run.providers if isinstance(p, StepCosine))
    seen = {}
    original = provider.from_states
    provider.from_states = lambda *a: seen.setdefault("found", original(*a))
    loss, _ = run.step(micro, run.reference.rows(micro.batch), given, {"groups": 2})
    loss.backward()
    found, scored = seen["found"]["cosine"], micro.batch.targets.flatten() != -100
    assert not found.requires_grad

    policy = models.load_model(model, run.config).eval()
    means: list[list[torch.Tensor]] = []
    for sequence in (s for e in run.examples[:2] for s in e.sequences):
        ids = torch.tensor(sequence.input_ids[None].astype("int64"))
        hidden = policy(ids, output_hidden_states=True).hidden_states[-1][0]
        at = hidden[sequence.completion_start - 1 : -1]
        index = torch.tensor(sequence.numbers["step_index"])
        means.append([at[index == k].mean(0) for k in range(1, int(index.max()) + 1)])
    want = []
    for n, sequence in enumerate(s for e in run.examples[:2] for s in e.sequences):
        labels = run.examples[n // 3].relevance
        best = means[3 * (n // 3) + labels.index(max(labels))]
        for k in sequence.numbers["step_index"].astype(int):
            there = k <= len(best)
            cosine = torch.cosine_similarity(means[n][k - 1], best[k - 1], 0) if there else -1.0
            want.append(float(torch.as_tensor(cosine).detach()))
    assert found[scored].tolist() == pytest.approx(want, abs=1e-4)
    assert min(want) == -1.0  # the third step of the worst answer


def test_tree_tpo_ranks_answers_by_its_steps(tmp_path, model):
    log = train(
        config(
            tmp_path / "out", model, rows(tmp_path), loss=("tree_tpo",), step_pattern=STEPS,
            max_steps=25, learning_rate=3e-3,
        )
    )["log_history"]  # fmt: skip
    assert log[-2]["loss"] < 0.5 * log[0]["loss"]


@pytest.mark.parametrize(
    ("option", "want"), [({"step_size": 3}, [1, 1, 1, 2, 2]), ({"step_count": 2}, [1, 1, 1, 2, 2])]
)
def test_adpo_trains_on_segments_of_answers(tmp_path, model, option, want):
    pairs = [{"prompt": f"{i}:", "chosen": "abcd", "rejected": f"xyz{i}"} for i in range(4)]
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    settings = config(
        tmp_path / "out", model, data, loss=("adpo",), max_steps=12, learning_rate=3e-3, **option
    )
    numbers = prepare(settings).examples[0].sequences[0].numbers
    assert numbers["step_index"].tolist() == want  # four letters and the end
    log = train(settings)["log_history"]
    # two segments at the reference: twice log 2
    assert log[0]["loss"] == pytest.approx(2 * math.log(2.0), rel=1e-5)
    assert log[-2]["loss"] < 0.6 * log[0]["loss"]


def test_columns_take_the_place_of_both(tmp_path, model):
    table = [
        {
            "prompt": f"{i}:", "responses": ["aa", "bb"], "scores": [1, 0],
            "step_index": [[1, 1, 2]] * 2, "own": [[0.5] * 3] * 2,
        }
        for i in range(2)
    ]  # fmt: skip
    data = write_rows(tmp_path / "d.jsonl", table)
    run = prepare(config(tmp_path, model, data, loss=("tree_tpo",), columns={"cosine": "own"}))
    assert not any(isinstance(p, (StepCosine, StepIndex)) for p in run.providers)
    with pytest.raises(ValueError, match="both say where steps are"):
        prepare(
            config(
                tmp_path, model, data, loss=("tree_tpo",), step_pattern="#",
                columns={"step_index": "step_index"},
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "pattern", "more", "match"),
    [
        ("dpo", "#", {}, "loss dpo reads no steps"),
        ("oreo", "#", {}, "level=step"),
        ("tree_tpo", "(", {}, "regular expression"),
        ("tree_tpo", "#*", {}, "matches the empty text"),
        ("tree_tpo", "#", {"score_prompt": True}, "scores prompts too"),
        ("tree_tpo", "#", {"step_size": 2}, "give one"),
    ],
)
def test_patterns_that_cannot_be_meant(tmp_path, model, loss, pattern, more, match):
    with pytest.raises(ValueError, match=match):
        prepare(config(tmp_path, model, "d", loss=(loss,), step_pattern=pattern, **more))


def test_without_steps_or_a_pattern_the_column_is_named(tmp_path, model):
    with pytest.raises(ValueError, match=r"reads step_index from it.*--step-pattern supplies it"):
        prepare(config(tmp_path, model, rows(tmp_path), loss=("tree_tpo",)))


def test_step_cosine_is_exact_where_steps_are_alike():
    states = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, -1.0]])
    cu = torch.tensor([0, 2, 4], dtype=torch.int32)
    found = step_cosine(
        states, cu, torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1.0, 0.0]),
        torch.ones(4, dtype=torch.bool), torch.tensor([1, 2, 1, 2]),
    )  # fmt: skip
    assert found.tolist() == pytest.approx([1.0, 1.0, 1.0, -1.0])
