"""Data of other formats, and what stands in a row by mistake: named, told or refused."""

from __future__ import annotations

import json

import pytest
from data_rows import CHAT, load
from tiny_tokenizer import byte_tokenizer


def test_scores_in_another_column_are_named():
    row = {"prompt": "q", "responses": ["bad", "good"]}
    with pytest.raises(ValueError, match=r"column 'ratings' holds one .*--column scores=ratings"):
        load(row | {"ratings": [1, 5]})
    note = "answers without scores (or ranks) are taken as stored best first"
    assert load(row).report.notes == [note]
    told = load(row | {"turns": [1, 2, 3], "ids": [7, 8]}).report.notes
    assert note in told and "columns with numbers that are not read: 'turns'" in told
    told = load(row | {"ratings": [1, 5], "scores": [0, 1]}).report.notes
    assert told == ["columns with numbers that are not read: 'ratings'"]
    assert load(row | {"ratings": [1, 5]}, renamed={"scores": "ratings"}).report.notes == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"from": "gpt", "value": "Yes."}, "has 'from' where 'role', 'value' where 'content'"),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "rain"}},
            "has 'function_call' where a list 'tool_calls' is read; rename it",
        ),
        ({"role": "user", "content": "Yes."}, "holds messages of 'user' alone, and an answer is"),
    ],
)
def test_messages_of_another_format_are_named(answer, words):
    with pytest.raises(ValueError, match=words):
        load(CHAT | {"chosen": [answer]}, chat=True)


def test_messages_as_text_are_refused():
    asks, text = json.dumps(CHAT["prompt"]), json.dumps(CHAT["chosen"])
    other = json.dumps(CHAT["rejected"])
    for row, column in (
        ({"prompt": asks, "chosen": "Yes.", "rejected": "No."}, "prompt"),
        ({"prompt": "Rain?", "chosen": text, "rejected": other}, "chosen"),
        ({"prompt": "Rain?", "completion": text, "label": True}, "completion"),
    ):
        with pytest.raises(ValueError, match=f"column '{column}': holds messages as JSON text"):
            load(row)
    assert load({"prompt": "JSON:", "chosen": text, "rejected": "none"}).report.kept == 1


def test_marks_in_messages_that_the_template_writes_are_told():
    told = "1 rows' messages hold marks (BOS, end of turn) that a template writes"
    end = byte_tokenizer(chat=True).eos_token
    assert load(CHAT, chat=True).report.notes == []
    ended = [{"role": "assistant", "content": f"Yes.{end}\n"}]
    assert told in load(CHAT | {"chosen": ended}, chat=True).report.notes
