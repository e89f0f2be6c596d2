"""Rows to token ids: layouts, implicit prompts, labels, weights, truncation, and every refusal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_tokenizer import byte_tokenizer
from tokenizers import processors

from prefkern.train.data import Loader, data_hash, length_baseline
from prefkern.train.data.columns import KINDS, Column
from prefkern.train.data.rows import BadRow, split_prompt

TOKENIZER = byte_tokenizer()
CHAT = byte_tokenizer(chat=True)
GOOD = {"prompt": "2 + 2 =", "chosen": " four", "rejected": " five"}


def load(rows, tokenizer=TOKENIZER, **options):
    return Loader(tokenizer=tokenizer, **options).load(rows)


def texts(sequence, tokenizer=TOKENIZER):
    start = sequence.completion_start
    return tokenizer.decode(sequence.input_ids[:start]), tokenizer.decode(
        sequence.input_ids[start:]
    )


def message(role, content):
    return {"role": role, "content": content}


def test_pair_with_explicit_prompt():
    (example,), layout, _ = load([GOOD])
    assert (
        layout == "pairs"
        and example.relevance is None
        and example.desirable is None
        and example.weight == 1.0
    )
    assert texts(example.sequences[0]) == ("2 + 2 =", " four</s>")
    assert texts(example.sequences[1]) == ("2 + 2 =", " five</s>")
    assert example.sequences[0].length == 6 and example.sequences[0].input_ids.dtype == np.int32


def test_implicit_prompt_is_the_common_beginning():
    (example,), _, _ = load([{"chosen": "2 + 2 = four", "rejected": "2 + 2 = five"}])
    # The space goes with the answers; the shared "f" of the words does not exist here: TRL cuts at
    # the first difference.
    assert texts(example.sequences[0]) == ("2 + 2 = f", "our</s>")
    assert split_prompt("say yes", "say no") == ("say", " yes", " no")
    turns = [message("user", "hi")]
    a, b = [message("assistant", "x")], [message("assistant", "y")]
    assert split_prompt(turns + a, turns + b) == (turns, a, b)
    for chosen, rejected in (("abc", "xyz"), (a, b)):
        with pytest.raises(BadRow, match="share no beginning"):
            split_prompt(chosen, rejected)


def test_implicit_prompts_hold_for_the_data_set():
    implicit = {"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}
    assert load([implicit, GOOD]).report.total == 0
    assert load([GOOD, implicit]).report.counts == {"column 'prompt': missing": 1}
    unshared = {"chosen": "abc", "rejected": "xyz"}
    report = load([implicit, unshared]).report
    assert "chosen and rejected share no beginning" in report.examples[0]


def test_conversations_follow_the_template():
    row = {
        "prompt": [message("user", "2 + 2?")],
        "chosen": [message("assistant", "4")],
        "rejected": [message("assistant", "5")],
    }
    (example,), _, _ = load([row], CHAT)
    assert texts(example.sequences[0], CHAT) == ("[user]2 + 2?</s>[assistant]", "4</s>")
    implicit = {
        "chosen": row["prompt"] + row["chosen"],
        "rejected": row["prompt"] + row["rejected"],
    }
    assert data_hash(load([implicit], CHAT).examples) == data_hash([example])
    # A plain prompt that repeats the first turn, as published sets have it.
    assert data_hash(load([{**implicit, "prompt": "2 + 2?"}], CHAT).examples) == data_hash(
        [example]
    )


def test_a_prompt_that_ends_in_the_assistants_turn_is_continued():
    row = {
        "prompt": [message("user", "2 + 2?"), message("assistant", "It is ")],
        "completion": [message("assistant", "4")],
        "label": True,
    }
    (example,), _, _ = load([row], CHAT)
    prompt, completion = texts(example.sequences[0], CHAT)
    assert prompt == "[user]2 + 2?</s>[assistant]It is "
    assert completion == "</s>[assistant]4</s>"


def test_conversation_without_template_is_an_error():
    row = {
        "prompt": [message("user", "a")],
        "completion": [message("assistant", "b")],
        "label": True,
    }
    with pytest.raises(ValueError, match="no chat template"):
        load([row])


def test_unpaired():
    rows = [{"prompt": "a", "completion": "b", "label": flag} for flag in (True, False)]
    examples, layout, _ = load(rows)
    assert layout == "unpaired" and [e.desirable for e in examples] == [True, False]


LISTS = {
    "scores": {"responses": ["x", "y", "z"], "scores": [0.5, 2, 1]},
    "completions": {"completions": ["x", "y", "z"], "scores": [0.5, 2, 1]},
    "ranks": {"completions": ["x", "y", "z"], "ranks": [3, 1, 2]},
    "nemo": {
        "completions": [
            {"rank": 2, "completion": "x"},
            {"rank": 0, "completion": "y"},
            {"rank": 1, "completion": "z"},
        ]
    },
    "best first": {"responses": ["y", "z", "x"]},
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(name):
    prompt = {"context" if name == "nemo" else "prompt": "q: "}
    (example,), layout, _ = load([prompt | LISTS[name]], list_labels="order")
    assert layout == "lists"
    found = {texts(s)[1]: y for s, y in zip(example.sequences, example.relevance, strict=True)}
    assert found == {"x</s>": 0.0, "z</s>": 1.0, "y</s>": 2.0}
    (raw,), _, _ = load([prompt | LISTS[name]])
    want = [0.5, 1.0, 2.0] if "scores" in LISTS[name] else [0.0, 1.0, 2.0]
    assert sorted(raw.relevance) == want


def test_list_order_depends_on_seed_and_row_only():
    rows = [{"prompt": "q", "responses": list("abcdefgh")} for _ in range(40)]

    def orders(rows, seed):
        return {e.row: e.relevance for e in load(rows, seed=seed).examples}

    first = orders(rows, 1)
    assert first == orders(rows, 1) and first != orders(rows, 2)
    assert len(set(first.values())) > 30, "rows are shuffled on their own"
    bad = [*rows[:5], {"prompt": "q", "responses": []}, *rows[6:]]
    assert orders(bad, 1) == {row: order for row, order in first.items() if row != 5}
    # Every place is equally likely to hold the best: 40 rows, 8 places.
    places = [labels.index(7.0) for labels in first.values()]
    assert max(places.count(i) for i in range(8)) <= 13


LONG = "x" * 30
BAD = {
    "prompt missing": (
        {"prompt": ...},
        "prompt",
        "is missing; the row's columns: 'chosen', 'rejected'",
    ),
    "prompt null": ({"prompt": None}, "prompt", "is null"),
    "chosen null": ({"chosen": None}, "chosen", "is null"),
    "chosen number": ({"chosen": 3}, "chosen", "must be a string or a list of messages, got int"),
    "prompt empty": ({"prompt": ""}, "prompt", "has no text"),
    "rejected blank": ({"rejected": " \n"}, "rejected", "has no text"),
    "equal": ({"rejected": " four"}, "rejected", "is the same as chosen"),
    "surrogate": ({"chosen": "a\ud800"}, "chosen", "half of a UTF-16 pair"),
    "mixed": ({"chosen": [message("assistant", "x")]}, "chosen", "where the prompt is str"),
    "message": ({"rejected": ["x"]}, "rejected", "message 0 must be an object"),
    "role": ({"rejected": [{"content": "x"}]}, "rejected", "a string under 'role', got null"),
    "weight": ({"weight": "1"}, "weight", "must be a number, got str"),
    "negative": ({"weight": -1}, "weight", "must be at least 0"),
    "nan weight": ({"weight": math.nan}, "weight", "must be finite, got nan"),
    "one ref": ({"ref_chosen_logps": -3.0}, "ref_rejected_logps", "missing beside"),
    "nan ref": (
        {"ref_chosen_logps": math.nan, "ref_rejected_logps": -1.0},
        "ref_chosen_logps",
        "must be finite",
    ),
    "token weights": ({"chosen_weights": [1.0]}, "chosen_weights", "1 numbers for 6 response tok"),
    "weight type": ({"chosen_weights": 1.0}, "chosen_weights", "must be a list of numbers"),
    "long prompt": ({"prompt": LONG}, "prompt", "30 tokens, which leaves no room in max_length 20"),
    "same start": (
        {"chosen": LONG + "a", "rejected": LONG + "b"},
        "rejected",
        "same 20 tokens as chosen",
    ),
    "template": ({"chat_template_kwargs": 3}, "chat_template_kwargs", "must be an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pair_is_reported_and_skipped(name):
    change, column, reason = BAD[name]
    row = {k: v for k, v in (GOOD | change).items() if v is not ...}
    examples, _, report = load([GOOD, row, GOOD], max_length=20)
    assert [e.row for e in examples] == [0, 2]
    assert report.examples[0].startswith(f"data[1] column '{column}': ")
    assert reason in report.examples[0]
    with pytest.raises(ValueError, match="strict"):
        load([GOOD, row], max_length=20, strict=True)


RANKED = {"prompt": "q", "responses": ["a", "b"], "scores": [1.0, 0.0]}
BAD_LISTS = {
    "no prompt": ({"prompt": None}, "prompt", "is null"),
    "one": (
        {"responses": ["a"], "scores": [1.0]},
        "responses",
        "must hold at least 2 responses, got 1",
    ),
    "text": ({"responses": "ab"}, "responses", "must be a list, got str"),
    "null answer": ({"responses": ["a", None]}, "responses[1]", "got null"),
    "nan": ({"scores": [1.0, math.nan]}, "scores[1]", "must be finite, got nan"),
    "huge": ({"scores": [1.0, 10**400]}, "scores[1]", "must be finite, got inf"),
    "bool": ({"scores": [True, 0.0]}, "scores[0]", "must be a number, got bool"),
    "short": ({"scores": [1.0]}, "scores", "must hold 2 entries, one per response, got 1"),
    "equal": ({"scores": [1.0, 1.0]}, "scores", "are all equal"),
    "both": ({"ranks": [0, 1]}, "ranks", "stands beside scores"),
    "twice": ({"responses": ["a", "a"]}, "responses[1]", "same as responses[0] with another"),
    "no scores": (
        {"responses": None, "completions": ["a", "b"], "scores": None},
        "scores",
        "lacks scores (or ranks) where the first row has some",
    ),
    "no rank": (
        {"responses": None, "scores": None, "completions": [{"completion": "a"}] * 2},
        "completions[0].rank",
        "must be a number, got null",
    ),
    "blank": ({"responses": ["a", ""]}, "responses[1]", "has no text"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_list_is_reported_and_skipped(name):
    change, column, reason = BAD_LISTS[name]
    examples, _, report = load([RANKED, RANKED | change, RANKED])
    assert [e.row for e in examples] == [0, 2]
    assert report.examples[0].startswith(f"data[1] column '{column}': ")
    assert reason in report.examples[0]


@pytest.mark.parametrize("label", [1, "true", None, 0.0])
def test_unpaired_label_must_be_a_bool(label):
    rows = [{"prompt": "a", "completion": "b", "label": x} for x in (True, label)]
    report = load(rows).report
    assert report.total == 1 and "column 'label'" in report.examples[0]


def test_template_refusal_is_a_bad_row():
    good = {
        "prompt": [message("user", "a")],
        "completion": [message("assistant", "b")],
        "label": True,
    }
    bad = {**good, "prompt": [message("wizard", "a")]}
    report = load([good, bad], CHAT).report
    assert "refused" in next(iter(report.counts)) and "no such role: wizard" in report.examples[0]


def test_layout_comes_from_the_first_row_that_fits():
    examples, layout, report = load([{"prompt": "x"}, {"text": "y"}, GOOD, RANKED])
    assert layout == "pairs" and len(examples) == 1 and report.total == 3
    with pytest.raises(ValueError, match=r"the columns found: 'question', 'answer'"):
        load([{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="can be used as unpaired"):
        load([GOOD], layout="unpaired")
    with pytest.raises(ValueError, match="layout must be auto or one of"):
        load([GOOD], layout="pair")


def test_joined_tokens_belong_to_the_response():
    # ": " alone is two tokens; before "y" the space joins the answer, as in byte-level BPE.
    tokenizer = byte_tokenizer(merges=(("\u0120", "y"),))
    row = {"prompt": "q: ", "chosen": "yes", "rejected": "no"}
    (example,), _, _ = load([row], tokenizer)
    assert [s.completion_start for s in example.sequences] == [2, 2]
    assert texts(example.sequences[0], tokenizer) == ("q:", " yes</s>")
    assert texts(example.sequences[1], tokenizer) == ("q:", " no</s>")
    swallowed = byte_tokenizer(merges=(("a", "b"),))
    report = load([GOOD, {"prompt": "a", "chosen": "b", "rejected": "bc"}], swallowed).report
    assert "has no token of its own" in report.examples[0]


def test_eos_is_appended_once_and_can_be_absent():
    (example,), _, _ = load([{**GOOD, "chosen": " four</s>"}])
    assert texts(example.sequences[0])[1] == " four</s>"
    bare = byte_tokenizer(eos=None)
    with pytest.raises(ValueError, match="no eos_token"):
        load([GOOD], bare)
    (example,), _, _ = load([GOOD], bare, append_eos=False)
    assert texts(example.sequences[0], bare)[1] == " four"


def test_a_tokenizer_that_ends_every_text_with_eos_ends_an_answer_once():
    ending = byte_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ending.eos_token_id)]
    )
    (example,) = load([GOOD], ending).examples
    assert texts(example.sequences[0], ending) == ("2 + 2 =", " four</s>")
    assert texts(example.sequences[1], ending) == ("2 + 2 =", " five</s>")


def test_max_length_keeps_the_start():
    rows = [{**GOOD, "chosen": " four and more"}, GOOD]
    examples, _, report = load(rows, max_length=13)
    assert texts(examples[0].sequences[0]) == ("2 + 2 =", " four ")
    assert texts(examples[0].sequences[1]) == ("2 + 2 =", " five</s>")
    assert report.truncated == 1 and report.total == 0, "13 tokens exactly are not truncated"
    with pytest.raises(ValueError, match="must not pass the model's context of 12"):
        load(rows, max_length=13, model_context=12)
    with pytest.raises(ValueError, match="at least 2"):
        load(rows, max_length=1)


def test_a_prompt_leaves_room_for_one_token_of_the_answer():
    prompt = len(TOKENIZER(GOOD["prompt"])["input_ids"])
    row = GOOD | {"chosen": "ab", "rejected": "cd"}
    (example,) = load([row], max_length=prompt + 1).examples
    assert [texts(seq)[1] for seq in example.sequences] == ["a", "c"]
    with pytest.raises(ValueError, match=f"leaves no room in max_length {prompt}"):
        load([row], max_length=prompt)


def test_an_answer_that_the_tokenizer_drops_is_no_answer():
    class Dropping:
        eos_token_id = TOKENIZER.eos_token_id

        def __call__(self, texts, **options):
            return TOKENIZER([text.replace("~", "") for text in texts], **options)

    rows = [GOOD, GOOD | {"chosen": "~~"}]
    report = load(rows, Dropping()).report
    assert report.examples == ["data[1] column 'chosen': has no token left in this tokenizer"]


def test_without_max_length_rows_beyond_the_context_are_left_out():
    rows = [GOOD, {**GOOD, "chosen": " four and more"}]
    examples, _, report = load(rows, max_length=None, model_context=13)
    assert len(examples) == 1 and report.truncated == 0
    assert "the model reads 13; set max_length" in report.examples[0]


def test_tokenizer_of_another_model():
    with pytest.raises(ValueError, match="embedding has 10 rows"):
        load([GOOD], vocab_size=10)


def test_weights_and_reference_columns():
    row = GOOD | {
        "weight": 2, "chosen_weights": [1, 2, 3, 4, 5], "rejected_weights": [1, 2, 3, 4, 5, 6],
        "ref_chosen_logps": -3.5, "ref_rejected_logps": -4,
    }  # fmt: skip
    (example,), _, _ = load([row])
    assert example.weight == 2.0
    assert example.ref_seq_logp == (-3.5, -4.0)
    assert example.sequences[0].token_weights.tolist() == [1, 2, 3, 4, 5, 1], "EOS weighs 1"
    assert example.sequences[1].token_weights.tolist() == [1, 2, 3, 4, 5, 6]
    (cut,), _, _ = load([row], max_length=10)
    assert cut.sequences[0].token_weights.tolist() == [1, 2, 3]


def test_length_baseline():
    longer = {"prompt": "q: ", "chosen": "aaaa", "rejected": "b"}
    shorter = {"prompt": "q: ", "chosen": "a", "rejected": "bbb"}
    same = {"prompt": "q: ", "chosen": "a", "rejected": "b"}
    assert length_baseline(load([longer, longer, shorter, same]).examples) == 2.5 / 4
    ranked = {"prompt": "q", "responses": ["aaa", "bb", "c"], "scores": [2, 1, 1]}
    assert length_baseline(load([ranked]).examples) == 1.0
    unpaired = load([{"prompt": "a", "completion": "b", "label": True}]).examples
    assert math.isnan(length_baseline(unpaired))


def test_data_hash_sees_what_changes_a_result():
    base = load([GOOD]).examples
    assert data_hash(base) == data_hash(load([dict(GOOD)]).examples)
    for other in (
        {**GOOD, "chosen": " for"},
        {**GOOD, "chosen": " fuor"},
        {**GOOD, "weight": 2.0},
        {**GOOD, "chosen_weights": [1.0] * 5},
        {**GOOD, "prompt": "2 + 2 = "},
    ):
        assert data_hash(load([other]).examples) != data_hash(base)
    single = {"prompt": "a", "completion": "b", "label": True}
    labels = [data_hash(load([single | {"label": x}]).examples) for x in (True, False)]
    scores = [data_hash(load([RANKED | {"scores": [x, 0.0]}]).examples) for x in (1.0, 2.0)]
    assert len({*labels, *scores}) == 4


def test_data_hash_sees_columns_where_it_is_told_to():
    columns = [Column(n, KINDS[n], n, "some_loss") for n in ("rm_margin", "aux_logp")]

    def hashes(margin, logp):
        row = GOOD | {"rm_margin": margin, "chosen_aux_logp": [logp] * 6}
        examples = load([row | {"rejected_aux_logp": [0.0] * 6}], columns=columns).examples
        return data_hash(examples), data_hash(examples, columns=True)

    found = [hashes(1.0, -1.0), hashes(2.0, -1.0), hashes(1.0, -2.0)]
    assert len({one for one, _ in found}) == 1 and len({both for _, both in found}) == 3
