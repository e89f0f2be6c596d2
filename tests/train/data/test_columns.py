"""Columns beside the texts: where their numbers end up, and what is said when they do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_models import config, save_model
from tiny_tokenizer import byte_tokenizer

from prefkern.losses import LOSSES
from prefkern.train import train
from prefkern.train.data import IGNORE, Loader, collate
from prefkern.train.data.columns import (
    ALONG,
    ANSWER,
    EITHER,
    KINDS,
    NAME,
    PAIRS,
    ROW,
    TEXT,
    TOKEN,
    VECTOR,
    Column,
)
from prefkern.train.data_providers import Columns

TOKENIZER = byte_tokenizer()
PAIR = {"prompt": "p:", "chosen": " ab", "rejected": " cde"}


def column(argument: str, name: str | None = None, kind: str | None = None) -> Column:
    return Column(argument, kind or KINDS[argument], name or argument, "some_loss")


def load(rows, *columns, **options):
    loader = Loader(tokenizer=TOKENIZER, columns=columns, strict=True, **options)
    return loader.load(rows).examples


@pytest.mark.parametrize("packed", [True, False])
def test_numbers_of_pairs(packed):
    rows = [
        PAIR | {
            "confidence": 0.25 * i, "margin_reward_chosen": [1.0, float(i)],
            "chosen_aux_logp": [-1.0, -2.0, -3.0, -4.0],
            "rejected_aux_logp": [-5.0, -6.0, -7.0, -8.0, -9.0],
            "chosen_reward": 1.0, "rejected_reward": -1.0, "annotator": "ann" if i else None,
        } for i in range(2)
    ]  # fmt: skip
    names = ("margin_reward_chosen", "aux_logp", "reward", "annotator")
    examples = load(rows, column("pref_prob", "confidence"), *(column(n) for n in names))
    batch = collate(examples, packed=packed)
    values, numbers = batch.columns, batch.numbers
    assert values["pref_prob"].tolist() == [0.0, 0.25]
    assert values["margin_reward_chosen"].tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert values["reward"].tolist() == [1.0, -1.0, 1.0, -1.0]
    assert values["annotator"] == ["unknown", "ann"]
    assert numbers["aux_logp"].shape == batch.targets.shape
    per_answer = numbers["aux_logp"][batch.targets != IGNORE]
    assert per_answer.tolist() == [*(-float(k) for k in range(1, 10))] * 2
    assert (numbers["aux_logp"][batch.targets == IGNORE] == 0).all()
    # the number beside a target is that of the target: " ", "a", "b" and the end token
    assert batch.targets[batch.targets != IGNORE][:3].tolist() == TOKENIZER(" ab")["input_ids"]


def test_numbers_per_token_are_cut_with_the_tokens():
    row = PAIR | {
        "chosen_aux_logp": [-1.0] * 4,
        "rejected_aux_logp": [-5.0, -6.0, -7.0, -8.0, -9.0],
    }
    (example,) = load([row], column("aux_logp"), max_length=5)
    numbers = [seq.numbers["aux_logp"].tolist() for seq in example.sequences]
    assert numbers == [[-1.0] * 3, [-5.0, -6.0, -7.0]]


def test_lists_are_shuffled_with_their_numbers():
    row = {
        "prompt": "q", "responses": [f" {k}" for k in "abcdef"], "scores": [5, 4, 3, 2, 1, 0],
        "preference_levels": [1, 2, 3, 4, 5, 6], "pairs": [[0, 5], [4, 1]], "pref_prob": [0.9, 0.2],
        "old_logp": [[float(-k)] * 3 for k in range(6)],
    }  # fmt: skip
    columns = [column(n) for n in ("preference_levels", "pairs", "old_logp")]
    columns.append(column("pref_prob", kind=ALONG))
    examples = load([row, row], *columns, seed=1)
    kept = load([row], *columns, shuffle_lists=False)[0]
    assert kept.relevance == (5, 4, 3, 2, 1, 0)
    batch = collate(examples)
    values = batch.columns
    relevance, first = batch.relevance, batch.cu_groups[:-1].tolist()
    assert examples[0].relevance != kept.relevance
    assert values["preference_levels"].tolist() == (6 - relevance).tolist()
    best = [relevance[i].item() for i, _ in values["pairs"].tolist()]
    other = [relevance[j].item() for _, j in values["pairs"].tolist()]
    assert best == [5, 1, 5, 1] and other == [0, 4, 0, 4]
    assert values["pref_prob"].tolist() == [0.9, 0.2, 0.9, 0.2]
    assert all(first[g // 2] <= i < first[g // 2] + 6 for g, (i, _) in enumerate(values["pairs"]))
    old = batch.numbers["old_logp"][batch.targets != IGNORE].reshape(12, 3)
    assert old[:, 0].tolist() == (relevance - 5).tolist()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pref_prob", {}, "column 'pref_prob': is missing; loss 'some_loss' reads pref_prob"),
        ("aux_logp", {}, r"'chosen_aux_logp': is missing.*\(chosen_NAME\)"),
        ("pref_prob", {"pref_prob": "high"}, "'pref_prob': must be a number, got str"),
        ("pref_prob", {"pref_prob": float("nan")}, "'pref_prob': must be finite"),
        ("topk", {"topk": 1.5}, "'topk': must hold integers, got 1.5"),
        ("reward", {"chosen_reward": [1.0], "rejected_reward": 1.0}, "must be one number per ans"),
        ("aux_logp", {"chosen_aux_logp": [0.0] * 3, "rejected_aux_logp": [0.0] * 5},
         r"'chosen_aux_logp': holds 3 numbers for 4 scored tokens \(the end token included\)"),
        ("aux_logp", {"chosen_aux_logp": [0.0] * 4, "rejected_aux_logp": [0.0] * 6},
         r"'rejected_aux_logp': holds 6 numbers for 5 scored tokens"),
        ("annotator", {"annotator": 1.5}, "'annotator': must be a name"),
        ("pairs", {"pairs": [[1, 1]]}, "holds .1, 1., which are not two of 2 answers"),
        ("pairs", {"pairs": [[0, 2]]}, "holds .0, 2., which are not two of 2 answers"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(name, change, message):
    with pytest.raises(ValueError, match=message):
        load([PAIR | change], column(name))


def test_rows_must_be_alike():
    rows = [PAIR | {"margin_reward_chosen": [1.0] * k} for k in (1, 2)]
    with pytest.raises(ValueError, match="margin_reward_chosen must be a list of numbers per row"):
        load(rows, column("margin_reward_chosen"))
    with pytest.raises(ValueError, match="no row has a name in column 'anotator'"):
        load([PAIR | {"annotator": "ann"}], column("annotator", "anotator"))


def test_every_kind_is_used_and_columns_are_asked_for_by_name(tmp_path):
    assert set(KINDS.values()) | {ALONG} == {ROW, VECTOR, ANSWER, TOKEN, EITHER, PAIRS, ALONG, NAME}
    run = config(tmp_path, "m", "d", loss=("dpo", "ipo_md"), columns={"pair_weight": "w"})
    found = Columns(run, [LOSSES[name] for name in run.loss]).columns.values()
    assert [(c.argument, c.column, c.kind, c.loss) for c in found] == [
        ("pair_weight", "w", ROW, "dpo")
    ]
    soft = Columns(config(tmp_path, "m", "d", loss=("soft_pairs",)), [LOSSES["soft_pairs"]])
    assert {c.argument: c.kind for c in soft.columns.values()} == {
        "pairs": PAIRS, "pref_prob": ALONG,
    }  # fmt: skip
    # bco takes it per row, kto as one number
    kto = config(tmp_path, "m", "d", loss=("kto",), columns={"undesirable_weight": "w"})
    with pytest.raises(ValueError, match="kto reads no column for 'undesirable_weight'"):
        Columns(kto, [LOSSES["kto"]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "m")


def first_row(tmp_path, model, rows, name="run", **options):
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_steps": 1, "per_device_train_batch_size": 4} | options
    return train(config(tmp_path / name, model, str(file), **options))["log_history"][0]


def test_an_optional_tensor_is_read_where_it_is_named(tmp_path, model):
    rows = [PAIR | {"prompt": f"{i}:", "w": float(i)} for i in range(3)]
    plain = first_row(tmp_path, model, rows, "plain")
    named = first_row(tmp_path, model, rows, "named", columns={"pair_weight": "w"})
    # at the start every pair costs ln 2; the weights are 0, 1 and 2
    assert named["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    rows[0]["w"] = 3.0
    named = first_row(tmp_path, model, rows, "three", columns={"pair_weight": "w"})
    assert named["loss"] == pytest.approx(2 * plain["loss"], rel=1e-6)


def test_gold_under_another_name(tmp_path, model):
    rows = [PAIR | {"reference": " xyz", "gold": " not this"}]
    row = first_row(tmp_path, model, rows, loss=("tpo",), columns={"gold": "reference"})
    same = first_row(tmp_path, model, [PAIR | {"gold": " xyz"}], "same", loss=("tpo",))
    assert row["loss"] == same["loss"] and row["nll_loss"] > 0


def test_labels_are_needed_only_where_a_loss_reads_them(tmp_path, model):
    rows = [{"prompt": "p:", "completion": f" a{i}"} for i in range(3)]
    other = save_model(tmp_path / "teacher", seed=4)
    row = first_row(tmp_path, model, rows, loss=("gkd",), ref_model=other)
    assert row["loss"] > 0 and row["mean_token_accuracy"] >= 0
    with pytest.raises(ValueError, match="no row of 3 fits a layout"):
        first_row(tmp_path, model, rows, "kto", loss=("kto",))


def test_a_pair_with_two_prompts_and_scored_prompts():
    """DOVE: one answer under each prompt; s = log p(prompt) + log p(answer given the prompt)."""
    row = {"prompt": "one:", "prompt_rejected": "three:", "chosen": " ab", "rejected": " ab"}
    with pytest.raises(ValueError, match="same as chosen"):
        load([{k: v for k, v in row.items() if k != "prompt_rejected"}])
    (plain,) = load([row])
    assert [s.completion_start for s in plain.sequences] == [4, 6]
    (whole,) = load([row], score_prompt=True)
    batch = collate([whole])
    ids = [TOKENIZER(row[p] + " ab")["input_ids"] for p in ("prompt", "prompt_rejected")]
    for seq, answer in zip(whole.sequences, ids, strict=True):
        assert seq.completion_start == 1 and seq.input_ids[:-1].tolist() == answer
    want = [*ids[0][1:], TOKENIZER.eos_token_id, *ids[1][1:], TOKENIZER.eos_token_id]
    assert batch.targets[batch.targets != IGNORE].tolist() == want
    weighed = row | {"chosen_weights": [0.5] * 3, "rejected_weights": [2.0] * 4}
    (weighed_example,) = load([weighed], score_prompt=True)
    assert weighed_example.sequences[0].token_weights.tolist() == [1.0] * 3 + [0.5] * 3 + [1.0]


def test_numbers_per_token_follow_answers_with_prompts_of_their_own():
    row = {"prompt": "one:", "prompt_rejected": "three:", "chosen": " ab", "rejected": " c"}
    row |= {"chosen_aux_logp": [-1.0, -2.0, -3.0, -4.0], "rejected_aux_logp": [-5.0, -6.0, -7.0]}
    (example,) = load([row], column("aux_logp"))
    numbers = [seq.numbers["aux_logp"].tolist() for seq in example.sequences]
    assert numbers == [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0]]


def test_a_third_answer_has_the_prompt_of_its_condition():
    """mm_dpo: the chosen answer again, under a prompt without its image."""
    row = PAIR | {"prompt_cond": "q:"}
    roles = {"cond": Column("cond", TEXT, "cond", "mm_dpo")}
    (example,) = load([row], roles=roles)
    found = [TOKENIZER.decode(seq.input_ids) for seq in example.sequences]
    assert found == ["p: ab</s>", "p: cde</s>", "q: ab</s>"]
    (other,) = load([row | {"cond": " z"}], roles=roles)
    assert TOKENIZER.decode(other.sequences[2].input_ids) == "q: z</s>"


def test_dove_is_dpo_over_the_whole_text(tmp_path, model):
    from transformers import AutoModelForCausalLM

    row = {"prompt": "one:", "prompt_rejected": "three:", "chosen": " ab", "rejected": " cd"}
    found = first_row(tmp_path, model, [row], score_prompt=True)
    policy = AutoModelForCausalLM.from_pretrained(model)
    for side, prompt in (("chosen", "one:"), ("rejected", "three:")):
        ids = [*TOKENIZER(prompt + row[side])["input_ids"], TOKENIZER.eos_token_id]
        with torch.no_grad():
            logp = policy(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        total = logp[np.arange(len(ids) - 1), ids[1:]].sum().item()
        assert found[f"logps/{side}"] == pytest.approx(total, rel=1e-4)
    with pytest.raises(ValueError, match=r"kto.*drop score_prompt"):
        kto = [{"prompt": "p", "completion": " a", "label": True}]
        first_row(tmp_path, model, kto, "kto", loss=("kto",), score_prompt=True)


def test_orpo_with_the_prompt_in_its_likelihood(tmp_path, model):
    """The prompt is in the likelihood and its denominator, not in the odds."""
    plain = first_row(tmp_path, model, [PAIR], "plain", loss=("orpo",))
    whole = first_row(tmp_path, model, [PAIR], "whole", loss=("orpo",), likelihood_prompt=True)
    assert whole["logps/chosen"] == pytest.approx(plain["logps/chosen"], rel=1e-5)
    longer = PAIR | {"prompt": "p", "chosen": ": ab", "rejected": ": cde"}
    other = first_row(tmp_path, model, [longer], "other", loss=("sft",))
    assert whole["nll_loss"] == pytest.approx(other["nll_loss"], rel=1e-5)
    assert whole["nll_loss"] != pytest.approx(plain["nll_loss"], rel=1e-3)


def test_losses_over_pairs_sequences_and_tokens_together(tmp_path, model):
    """One run, one set of weights: a pair of weight 0 is not there for any of the losses."""
    common = dict(loss=("dpo", "entropy_bonus", "kl_penalty"), ref_model=save_model(
        tmp_path / "reference", seed=8), per_device_train_batch_size=2)  # fmt: skip
    hidden = PAIR | {"prompt": "not:", "weight": 0.0}
    both = first_row(tmp_path, model, [PAIR, hidden], "both", **common)
    other = PAIR | {"prompt": "now:", "weight": 0.0}
    same = first_row(tmp_path, model, [PAIR, other], "same", **common)
    for name in ("loss/dpo", "loss/entropy_bonus", "loss/kl_penalty"):
        assert both[name] == pytest.approx(same[name], rel=1e-5) and both[name] != 0.0
