"""The same rows from every format give the same tokens; what no chat template reads is told."""

from __future__ import annotations

import datetime
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tiny_tokenizer import byte_tokenizer

from prefkern.train.data import load_examples

TEMPLATE = (
    "{% if budget is defined %}{{ budget }};{% endif %}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.name }}{{ c.arguments | tojson }}{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer():
    found = byte_tokenizer()
    found.chat_template = TEMPLATE
    return found


def call(arguments) -> list[dict]:
    calls = [{"name": "pay", "arguments": arguments}]
    return [{"role": "assistant", "content": "", "tool_calls": calls}]


def row(sum_: float, limit: float, budget: float, **more) -> dict:
    tools = [{"name": "pay", "limits": [limit, 2.5]}]
    return {
        "prompt": [{"role": "user", "content": "Pay."}], "chosen": call({"sum": sum_}),
        "rejected": call({"sum": 0.125}), "tools": tools,
        "chat_template_kwargs": {"budget": budget},
    } | more  # fmt: skip


def test_whole_numbers_in_objects_do_not_depend_on_the_format(tmp_path):
    """Arrow has 1.0 for the 1 of a row beside one with 0.5."""
    rows = [row(1, 10, 3), row(1.5, 0.5, 0.75), row(2.0, -7, 4), row(2**53, 1e18, 0)]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    sources = (lines, tmp_path / "rows.parquet", datasets.Dataset.from_list(rows), rows)
    found = [load_examples(s, tokenizer=tokenizer()).examples for s in sources]
    texts = [[tokenizer().decode(e.sequences[0].input_ids) for e in examples] for examples in found]
    assert "3;" in texts[0][0] and "[10, 2.5]" in texts[0][0] and '{"sum": 1}' in texts[0][0]
    assert '{"sum": 1.5}' in texts[0][1] and '{"sum": 2}' in texts[0][2]
    assert all(other == texts[0] for other in texts[1:])


def test_a_number_in_json_text_is_as_it_was_written():
    text = row(1, 1, 1, chosen=call('{"sum": 1.0}'))
    (example,) = load_examples([text], tokenizer=tokenizer()).examples
    assert '{"sum": 1.0}' in tokenizer().decode(example.sequences[0].input_ids)


@pytest.mark.parametrize("place", ["chosen", "tools", "chat_template_kwargs"])
def test_a_date_is_told(place):
    day = datetime.datetime(2024, 5, 6)
    more = {
        "chosen": call({"day": day}), "tools": [{"name": "pay", "since": day}],
        "chat_template_kwargs": {"since": day},
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"column '{place}': .*the date 2024-05-06.* is no JSON"):
        load_examples([row(1, 1, 1, **{place: more[place]})], tokenizer=tokenizer())


def test_what_the_template_does_not_read_is_named():
    chosen = [{"role": "assistant", "content": "Yes.", "reasoning_content": "I think."}]
    more = {"chat_template_kwargs": {"budget": 1, "enable_thinking": False}, "chosen": chosen}
    told = "\n".join(load_examples([row(1, 1, 1, **more)] * 3, tokenizer=tokenizer()).report.notes)
    assert "3 rows' chat_template_kwargs hold 'enable_thinking'" in told
    assert "3 rows' messages hold 'reasoning_content', which the chat template does not" in told
    assert "'budget'" not in told and "'tool_calls'" not in told
    whole = tokenizer()
    whole.chat_template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    rows = [row(1, 1, 1, chosen=chosen, chat_template_kwargs=None, tools=None)]
    assert not any("hold" in note for note in load_examples(rows, tokenizer=whole).report.notes)


def test_messages_as_text_are_no_prompt():
    text = json.dumps([{"role": "user", "content": "Hello"}])
    rows = [{"prompt": text, "chosen": "yes", "rejected": "no"}]
    with pytest.raises(ValueError, match="column 'prompt': holds messages as JSON text"):
        load_examples(rows, tokenizer=tokenizer())
