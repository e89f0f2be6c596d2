"""The data of a round: which prompts, who answers which, against which reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import config, save_model, tiny_model
from tiny_tokenizer import byte_tokenizer

from prefkern.losses import LOSSES
from prefkern.train.processes import make_accelerator
from prefkern.train.recipes.online import round_data
from prefkern.train.recipes.online.makers import maker_of
from prefkern.train.recipes.online.round_data import (
    Start,
    make_sampler,
    prompts_of_round,
    with_room,
)
from prefkern.train.recipes.online.sampling import Answer

PROMPTS = [{"prompt": f"{x}:"} for x in "abcde"]


def online(folder="o", model="m", **options):
    base = dict(round_data="online", judge="x:y", max_new_tokens=4, keep_unfinished=True)
    return config(folder, model, "d", **base | options)


def test_prompts_of_a_round_go_on_where_the_last_one_ended():
    def taken(count, number):
        rows = prompts_of_round(online(prompts_per_round=count), PROMPTS, number)
        return "".join(row["prompt"][0] for row in rows)

    assert [taken(2, n) for n in range(3)] == ["ab", "cd", "ea"]
    assert [taken(None, n) for n in range(2)] == ["abcde", "abcde"]


def test_a_prompt_needs_room_for_the_answer_and_its_end():
    rows = [{"prompt": "a" * n} for n in (58, 59, 60)]
    kept = with_room(rows, byte_tokenizer(), tiny_model(), online())  # 64 tokens: 59 + 4 + the end
    assert [len(row["prompt"]) for row in kept] == [58, 59]
    with pytest.raises(ValueError, match="row 1 of d has no prompt"):
        with_room([{"prompt": "a"}, {"prompt": ""}], byte_tokenizer(), tiny_model(), online())
    short = tiny_model(max_position_embeddings=32)
    with pytest.raises(ValueError, match="within 32 tokens"):
        with_room([{"prompt": "a" * 28}], byte_tokenizer(), short, online())


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_answers_its_share_and_gets_all(monkeypatch, rank):
    calls = []

    def sample_answers(policy, tokenizer, rows, **options):
        calls.append(([row["prompt"] for row in rows], options["seed"]))
        return [[Answer(row["prompt"] + "!", True)] for row in rows]

    def gather(everyone, mine):
        for i in range(2):
            everyone[i] = [[Answer(row["prompt"] + "!", True)] for row in PROMPTS[i::2]]

    monkeypatch.setattr(round_data.sampling, "sample_answers", sample_answers)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    accelerator = SimpleNamespace(process_index=rank, num_processes=2)
    found = round_data.sample(online(seed=7), PROMPTS, 3, None, None, None, accelerator)
    assert calls == [([p["prompt"] for p in PROMPTS[rank::2]], 7 + 3000 + rank)]
    assert [answer.text for (answer,) in found] == [p["prompt"] + "!" for p in PROMPTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / f"m{seed}", seed=seed) for seed in range(2)]


def made(tmp_path, models, start: Start, **options) -> list[dict]:
    judge = "def length(row, answers):\n    return [1.0 * len(a) for a in answers]\n"
    (tmp_path / "judge.py").write_text(judge)
    settings = online(
        tmp_path, models[0], loss=("fdpg",), judge=f"{tmp_path}/judge.py:length", **options
    )
    maker = maker_of(settings, [LOSSES["fdpg"]])
    sampler = make_sampler(settings, PROMPTS, start, maker, make_accelerator(settings))
    rows, facts = sampler.rows(start.number)
    assert facts["rows"] == len(rows) and facts["answers"] == 10
    return rows


def test_the_reference_of_a_target_is_the_one_that_is_named(tmp_path, models):
    """log_target_prob less the score is the reference's log-probability, up to a constant."""
    same = made(tmp_path, models, Start(0, models[0], None))
    named = made(tmp_path, models, Start(0, models[0], models[0]))
    other = made(tmp_path, models, Start(0, models[0], models[1]))
    assert same == named
    assert [r["completion"] for r in same] == [r["completion"] for r in other]
    assert [r["log_target_prob"] for r in same] != [r["log_target_prob"] for r in other]
    later = made(tmp_path, models, Start(1, models[0], None))
    assert [r["completion"] for r in same] != [r["completion"] for r in later]  # sampled anew
