"""Judged lists as pairs, lists and single answers."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import config, tiny_model
from tiny_tokenizer import byte_tokenizer

from prefkern.losses import LOSSES
from prefkern.train.recipes.answer_logps import answer_logps
from prefkern.train.recipes.online.makers import MAKERS, maker_of
from prefkern.train.recipes.online.policy_gradient import token_reward_rows
from prefkern.train.recipes.online.rows import RoundModels, pair_rows, single_rows

LISTS = [
    {"prompt": "x:", "completions": ["a", "bb", "ccc"], "scores": [1.0, 4.0, 2.0]},
    {"prompt": "y:", "completions": ["d", "ee"], "scores": [3.0, 3.0]},
]


def made(loss: str, **options) -> list[dict]:
    settings = config("o", "m", "d", loss=(loss,), **options)
    return maker_of(settings, [LOSSES[loss]]).rows(LISTS, None)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_pairs_are_those_of_the_option_and_leave_out_ties():
    (worst,) = made("dpo")
    assert (worst["chosen"], worst["rejected"]) == ("bb", "a")
    assert (worst["chosen_score"], worst["rejected_score"]) == (4.0, 1.0)
    for pairs, count in (("all", 3), ("best_vs_rest", 2), ("adjacent", 2)):
        assert len(made("dpo", online_pairs=pairs)) == count
    assert "pref_prob" not in worst and "preference_prob" not in worst


def test_the_judges_gap_as_a_probability():
    (row,) = made("soft_label")
    assert row["pref_prob"] == pytest.approx(sigmoid(3.0))
    (row,) = made("ipo_md", soft_judge=True, round_data="online", judge="a:b")
    assert row["preference_prob"] == pytest.approx(sigmoid(3.0)) and "pref_prob" not in row
    with pytest.raises(ValueError, match="nothing is preferred"):
        pair_rows(LISTS[1:], pairs="all")


def test_lists_keep_what_is_ranked_and_soft_pairs_every_strict_pair():
    assert made("lipo") == LISTS[:1]
    (row,) = made("soft_pairs")
    assert row["pairs"] == [[1, 0], [1, 2], [2, 0]]
    assert row["pref_prob"] == pytest.approx([sigmoid(3.0), sigmoid(2.0), sigmoid(1.0)])


def test_single_answers_take_their_entries_in_order():
    rows = single_rows(LISTS, {"n": range(5)})
    assert [(r["prompt"], r["completion"], r["n"]) for r in rows] == [
        ("x:", "a", 0), ("x:", "bb", 1), ("x:", "ccc", 2), ("y:", "d", 3), ("y:", "ee", 4),
    ]  # fmt: skip
    assert all("scores" not in row for row in rows)


def test_answers_that_a_model_cannot_read_are_left_out_everywhere():
    """A model with a short context reads some of them; the others keep their places."""
    settings, tokenizer = config("o", "m", "d", max_length=8), byte_tokenizer()
    lists = [
        {"prompt": "x:", "completions": ["a", "b"], "scores": [1.0, 2.0]},
        {"prompt": "z" * 8, "completions": ["c"], "scores": [3.0]},
        {"prompt": "y:", "completions": ["d", "ee"], "scores": [4.0, 5.0]},
    ]
    one, two = tiny_model(), tiny_model(seed=1)
    models = RoundModels(config=settings, tokenizer=tokenizer, policy=one, reference=two)
    kept, (own, ref) = models.logps(lists, "policy", "reference")
    assert [row["completions"] for row in kept] == [["a", "b"], ["d", "ee"]]
    assert [row["scores"] for row in kept] == [[1.0, 2.0], [4.0, 5.0]]
    rows = [{"prompt": "x:"}, {"prompt": "x:"}, {"prompt": "y:"}, {"prompt": "y:"}]
    for model, found in ((one, own), (two, ref)):
        want = answer_logps(model, tokenizer, rows, ["a", "b", "d", "ee"], settings)
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_answers_that_one_of_the_models_cannot_read_are_left_out_of_all():
    """The reference reads 5 tokens: not x:ccc and its end."""
    settings, two = config("o", "m", "d", max_length=None), tiny_model(max_position_embeddings=5)
    models = RoundModels(settings, byte_tokenizer(), policy=tiny_model(), reference=two)
    kept, (own, ref) = models.logps(LISTS, "policy", "reference")
    assert [row["completions"] for row in kept] == [["a", "bb"], ["d", "ee"]]
    assert [row["scores"] for row in kept] == [[1.0, 4.0], [3.0, 3.0]]
    assert [len(x) for x in own] == [len(x) for x in ref] == [2, 3, 2, 3]


def test_token_rewards_are_of_the_three_models_by_their_names():
    settings, tokenizer = config("o", "m", "d", loss=("rto",)), byte_tokenizer()
    aux, reference, policy = (tiny_model(seed=seed) for seed in range(3))
    models = RoundModels(settings, tokenizer, policy=policy, reference=reference, aux=aux)
    found = maker_of(settings, [LOSSES["rto"]]).rows(LISTS, models)
    prompts = [row for row in LISTS for _ in row["completions"]]
    texts = [text for row in LISTS for text in row["completions"]]
    logps = [
        answer_logps(model, tokenizer, prompts, texts, settings)
        for model in (aux, reference, policy)
    ]
    wanted = token_reward_rows(LISTS, *logps, [torch.zeros_like(x) for x in logps[2]])
    assert found == wanted
    assert [row["old_logp"] for row in found] == [x.tolist() for x in logps[2]]


def test_models_that_are_not_there():
    from contextlib import contextmanager

    opened = []

    @contextmanager
    def off():
        opened.append(1)
        yield

    settings = config("o", "m", "d", loss=("rto",))
    models = RoundModels(config=settings, tokenizer=byte_tokenizer(), policy=tiny_model(), off=off)
    _, (own, ref) = models.logps(LISTS, "policy", "reference")
    assert opened == [1] and torch.equal(own[0], ref[0])  # the policy, its adapter switched off
    alone = RoundModels(config=settings, tokenizer=byte_tokenizer(), policy=tiny_model())
    with pytest.raises(ValueError, match="loss rto needs a reference model"):
        alone.logps(LISTS, "reference")
    with pytest.raises(ValueError, match="reads token rewards off a DPO-trained model: set aux"):
        maker_of(settings, [LOSSES["rto"]]).rows(LISTS, alone)


def test_every_maker_serves_a_loss_and_rows_of_other_kinds_are_refused():
    settings = config("o", "m", "d")
    kinds = set()
    for name, record in LOSSES.items():
        try:
            kinds.add(type(maker_of(settings, [record])))
        except ValueError as error:
            assert f"loss {name!r} reads" in str(error)
    assert kinds == set(MAKERS)
    for name in ("tpo", "mm_dpo", "kto", "poft"):
        with pytest.raises(ValueError, match="cannot make the rows"):
            maker_of(settings, [LOSSES[name]])
