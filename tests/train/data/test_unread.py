"""What stands in a row and is not read, and what acts by its name: told or refused."""

from __future__ import annotations

import json

import pytest
from data_rows import CHAT, load
from tiny_tokenizer import byte_tokenizer

from prefkern.train.data import Loader, load_examples
from prefkern.train.data.read import raw_rows

PAIR = {"chosen": "Red apples.", "rejected": "The sky."}


@pytest.mark.parametrize(
    "beside",
    [
        {"question": "Which fruit?"},
        {"instruction": "Translate.", "input": "rouge"},
        {"query": "Which fruit?"},
        {"system": "Be brief."},
        {"history": [["Hello", "Hi"]]},
        {"context": "A shop."},
        {"messages": [{"role": "user", "content": "Which fruit?"}]},
        {"conversations": [{"from": "human", "value": "Which fruit?"}]},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_a_prompt_in_another_column_is_named(beside):
    name = next(iter(beside))
    first = {"chosen": "The apple.", "rejected": "The sky."}  # share "The": no prompt
    with pytest.raises(ValueError, match=f"no column 'prompt'.*{name}.*--column prompt="):
        load(first | beside)
    told = load(PAIR | {"prompt": "Which?"} | beside).report
    assert any("not read" in note and repr(name) in note for note in told.notes)
    # a dialogue holds its prompt: its other columns are named and nothing is refused
    talk = {"chosen": "Human: which?\nAssistant: red", "rejected": "Human: which?\nAssistant: no"}
    assert repr(name) in str(load(talk | beside).report)


@pytest.mark.parametrize(
    ("answers", "beside"),
    [
        (("Q is the letter.", "Q is it not."), {"question": "Which letter?"}),
        (("Start with red.", "Start with blue."), {"task": "Order the colours."}),
        (("System time is 3.", "System time is 4."), {"query": "The time?"}),
        (("The 4", "The 5"), {"question": "2 + 2"}),
        (("The 4", "The 5"), {"problem": 17}),
        (
            tuple([{"role": "assistant", "content": x} for x in ("Sure.", y)] for y in "ab"),
            {"messages": [{"role": "user", "content": "Which?"}]},
        ),
    ],
)  # fmt: skip
def test_answers_that_only_seem_to_hold_their_prompt(answers, beside):
    chosen, rejected = answers
    with pytest.raises(ValueError, match="there is no column 'prompt', and the columns"):
        load({"chosen": chosen, "rejected": rejected} | beside, chat=True)


@pytest.mark.parametrize(
    "begin",
    [
        "\n\nHuman: hi\n\nAssistant:", "### Instruction:\nAdd.", "<|im_start|>user\nhi",
        "[INST] hi", "<s>[INST] hi", "<start_of_turn>user", "<|begin|><|start_header_id|>user",
        "USER : hi", "Below is an instruction that describes a task.", "Question:\nWhich?",
        "<|user|>\nhi",
    ],
)  # fmt: skip
def test_dialogues_hold_their_prompt(begin):
    found = load({"chosen": f"{begin} yes", "rejected": f"{begin} no", "query": "a note"})
    assert any("'query'" in note for note in found.report.notes)


def test_columns_of_numbers_are_named():
    more = {"images": 3, "margin": 0.5, "id": 7, "row_index": 1, "lengths": [3, 4], "label": True}
    (note,) = load(PAIR | {"prompt": "Which?"} | more).report.notes
    assert note == (
        "columns with numbers that are not read: 'images', 'margin', 'lengths', 'label'"
    )


def test_a_named_column_must_be_there():
    loader = Loader(tokenizer=byte_tokenizer(), renamed={"prompt": "qestion"})
    with pytest.raises(ValueError, match=r"no column 'qestion', from which prompt .*'question'"):
        loader.load([PAIR | {"question": "Which?"}])


def test_a_column_is_read_as_the_prompt():
    loader = Loader(tokenizer=byte_tokenizer(), renamed={"prompt": "question"})
    found = loader.load([PAIR | {"question": "Which?", "id": 7}])
    want = load(PAIR | {"prompt": "Which?"})
    assert found.report.notes == []
    for a, b in zip(found.examples[0].sequences, want.examples[0].sequences, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image", "a.png"), ("images", ["a.png"]),
        ("images", [{"bytes": b"\x89PNG", "path": None}]),
        ("audio", {"path": "a.wav"}), ("video", "a.mp4"), ("videos", ["a.mp4"]),
        ("scan", b"\x89PNG"),
        ("scan", {"bytes": b"\x89PNG", "path": None}), ("image_path", "a.png"),
        ("img", "a"), ("image_0", "a"), ("image_base64", "iVBORw0"), ("photos", ["a"]),
        # files by their endings, in columns of any name and at any depth
        ("frames", ["a.PNG", "b.jpeg"]), ("clip", "https://x.org/a b.mp4".replace(" ", "_")),
        ("media", [{"type": "file", "path": "x/y.wav"}]), ("scan", "data:image/png;base64,iVBO"),
    ],
)  # fmt: skip
def test_pictures_and_sound_are_refused(name, value):
    with pytest.raises(ValueError, match=f"column '{name}' holds pictures, sound or other bytes"):
        load(PAIR | {"prompt": "Which?", name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", []),
        ("image", None),
        ("image_width", 3),
        ("image_caption", "a cat"),
        ("note", "see the file a.png"),
        ("source", "a.pdf"),
        ("imagery", "vivid"),
    ],
)
def test_columns_of_pictures_without_one_are_fine(name, value):
    assert load(PAIR | {"prompt": "Which?", name: value}).report.kept == 1


def test_columns_that_act_are_announced():
    rows = [PAIR | {"prompt": f"q{i}", "weight": w} for i, w in enumerate([0, 2, 0.5])]
    note = "column 'weight' (in 3 rows) multiplies the loss of its row: from 0 to 2, 0 in 1"
    assert load(*rows).report.notes == [note]
    nothing = load(*[row | {"weight": 0} for row in rows]).report.notes
    assert nothing[0].endswith("0 in 3, so nothing is trained")
    acting = {"prompt_rejected": "other", "rejected_weights": [1.0] * 8}
    notes = load(PAIR | {"prompt": "q"} | acting).report.notes
    assert [note.split("'")[1] for note in notes] == ["prompt_rejected", "rejected_weights"]


def with_bos():
    from tokenizers import processors

    tokenizer = byte_tokenizer(chat=True)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|end|>"]})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def test_special_tokens_are_not_doubled():
    tokenizer = with_bos()
    row = {"prompt": "Item:", "chosen": " yes", "rejected": " no"}
    plain = load_examples([row], tokenizer=tokenizer)
    marked = load_examples([row | {"prompt": "<s>Item:"}], tokenizer=tokenizer)
    for a, b in zip(plain.examples[0].sequences, marked.examples[0].sequences, strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist()
        assert a.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert marked.report.notes == ["1 prompts begin with BOS, so no second one was added"]
    ended = row | {"chosen": " yes<|end|>\n", "rejected": " no</s>"}
    chosen, rejected = load_examples([ended], tokenizer=tokenizer).examples[0].sequences
    assert tokenizer.decode(chosen.input_ids).endswith("yes<|end|>\n")
    assert rejected.input_ids.tolist().count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_values", [[0.5, 1.0]]),
        ("pixel_values_videos", [[1]]),
        ("input_features", [1]),
        ("audio", [0.25, -0.5]),
    ],
)
def test_pictures_and_sound_as_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"column '{name}' holds pictures, sound"):
        load(PAIR | {"prompt": "Which?", name: value})
    assert load(PAIR | {"prompt": "Which?", "images": 3}).report.kept == 1


def test_a_column_that_is_nearly_named_as_one_that_acts_is_told():
    notes = load(PAIR | {"prompt": "Which?", "Weights": 0.5, "id": 3}).report.notes
    assert notes == ["column 'Weights' is not read; 'weight' would be"]


def test_what_goes_to_a_template_needs_one():
    plain = PAIR | {"prompt": "Which?"}
    report = load(plain, plain | {"tools": [{"name": "x"}]}).report
    assert report.kept == 1 and "beside a plain text" in report.examples[0]
    notes = load(plain | {"chat_template_kwargs": {"thinking": True}}).report.notes
    assert "1 plain texts have chat_template_kwargs, which nothing reads there" in notes


def test_documents_that_a_template_leaves_out_are_refused():
    row = CHAT | {"chat_template_kwargs": {"documents": [{"title": "Oslo", "text": "It rains."}]}}
    report = load(CHAT, row, chat=True).report
    assert report.kept == 1 and "documents, which the chat template does not" in report.examples[0]
    reads = "{% for d in documents or [] %}D{{ d.text }}{% endfor %}" + TOOLS
    assert "DIt rains." in texts([row], tool_tokenizer(reads))[0][0]


# Tool calls. The template writes what a chat model's does.
TOOLS = (
    "{% for t in tools or [] %}T{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant', 'tool') %}"
    "[{{ m.role }}]{% if m.reasoning_content %}R{{ m.reasoning_content }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "C{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tool_tokenizer(template=TOOLS):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def call(city, **message):
    function = {"name": "rain", "arguments": {"city": city}}
    return [{"role": "assistant", "tool_calls": [{"function": function}]} | message]


def schema(**properties):
    inner = {"name": "rain", "parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": inner}


def rows_of_calls():
    city, day = schema(city={"type": "string"}), schema(day={"type": "integer", "minimum": 1})
    base = {"prompt": CHAT["prompt"], "tools": [city]}
    return [
        base | {"chosen": call("Oslo", content=None), "rejected": call("Rome", content="")},
        base | {"chosen": call("Oslo"), "rejected": CHAT["rejected"], "tools": [day, city]},
        base
        | {"chosen": call("Bern", reasoning_content="hm", content=None), "rejected": call("A")},
    ]


def texts(rows, tokenizer):
    found = load_examples(rows, tokenizer=tokenizer, strict=True).examples
    return [[tokenizer.decode(s.input_ids) for s in e.sequences] for e in found]


def test_tool_calls_are_answers(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    tokenizer, rows = tool_tokenizer(), rows_of_calls()
    want = texts(rows, tokenizer)
    assert want[0][0].endswith('[user]Rain?;[assistant]Crain{"city": "Oslo"};')
    assert "Rhm" in want[2][0] and "null" not in str(want)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert texts(str(tmp_path / "rows.jsonl"), tokenizer) == want
    assert texts(str(tmp_path / "rows.parquet"), tokenizer) == want
    assert texts(datasets.Dataset.from_list(rows), tokenizer) == want
    stored = [row | {"tools": json.dumps(row["tools"])} for row in rows]
    assert texts(stored, tokenizer) == want
    for row in stored:
        for side in ("chosen", "rejected"):
            for message in row[side]:
                for one in message.get("tool_calls", []):
                    one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    assert texts(stored, tokenizer) == want


def test_keys_have_one_order_whatever_file_they_come_from(tmp_path):
    """Arrow's structs have the keys of all rows in one order; lines of JSON have each their own."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    def calls(**arguments):
        return call("A", tool_calls=[{"function": {"name": "rain", "arguments": arguments}}])

    def tool(**parameters):
        return {"type": "function", "function": {"name": "rain", "parameters": parameters}}

    rows = [
        {"chosen": calls(city="Oslo"), "rejected": calls(day=1, city="Rome"), "tools": [tool(a=1)]},
        {
            "chosen": calls(unit="C", city="Bern"), "rejected": calls(city="A", day=2),
            "tools": [tool(b=2, a=1), tool(a=3, c={"y": 1, "x": 2})],
        },
        {
            "chosen": calls(day=3, unit="F", city="C"), "rejected": CHAT["rejected"],
            "tools": [tool(c={"x": 1, "y": 2}, b=3)],
        },
    ]  # fmt: skip
    rows = [{"prompt": CHAT["prompt"], **row} for row in rows]
    tokenizer = tool_tokenizer()
    want = texts(datasets.Dataset.from_list(rows), tokenizer)
    assert '{"city": "Bern", "unit": "C"}' in want[1][0] and '"x": 2' in want[1][0]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    for source in (rows, tmp_path / "rows.jsonl", tmp_path / "rows.parquet", loaded):
        assert texts(source, tokenizer) == want


def test_what_is_nested_too_deeply_is_one_row(tmp_path):
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    rows = [rows_of_calls()[0], rows_of_calls()[0] | {"tools": deep}]
    report = load_examples(rows, tokenizer=tool_tokenizer()).report
    assert report.kept == 1 and "stand in each other too deeply" in report.examples[0]


def test_a_template_that_joins_strings_gets_strings():
    joined = TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
    want = texts(rows_of_calls(), tool_tokenizer())
    assert texts(rows_of_calls(), tool_tokenizer(joined)) == want


@pytest.mark.parametrize(
    ("row", "column", "detail"),
    [
        (CHAT | {"tools": "not JSON"}, "tools", "must be a list of objects, or one as JSON text"),
        (CHAT | {"tools": [1]}, "tools", "must be a list of objects"),
        (CHAT | {"chosen": call("A", tool_calls=3)}, "chosen", "needs a list of objects under"),
        (CHAT | {"chosen": [{"role": "assistant", "content": None}]}, "chosen", "needs a string"),
        (CHAT | {"chosen": [{"role": "assistant", "content": " "}]}, "chosen", "has no text"),
        (CHAT | {"chosen": [{"role": "narrator", "content": "x"}]}, "chosen", "is not rendered"),
        (CHAT | {"prompt": [{"role": "developer", "content": "x"}]}, "prompt", "is not rendered"),
        (CHAT | {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "brings"),
    ],
)
def test_rows_that_would_become_another_conversation(row, column, detail):
    found = load_examples([row, CHAT], tokenizer=tool_tokenizer())
    assert found.report.kept == 1
    assert f"'{column}'" in found.report.examples[0] and detail in found.report.examples[0]


def test_what_a_template_drops_is_told():
    deaf = tool_tokenizer(
        TOOLS.replace("{% for t in tools or [] %}T{{ t | tojson }}{% endfor %}", "")
    )
    with pytest.raises(ValueError, match="column 'tools': are not rendered by the chat template"):
        texts([rows_of_calls()[0]], deaf)
    mute = tool_tokenizer("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="message 0 has tool calls, which are not rendered"):
        texts([{k: v for k, v in rows_of_calls()[0].items() if k != "tools"}], mute)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ nope.x.y }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"]
)
def test_a_row_cannot_end_a_run(template):
    guarded = "{% if bad %}" + template + "{% endif %}" + TOOLS
    bad = CHAT | {"chat_template_kwargs": {"bad": True}}
    report = load_examples([bad, CHAT], tokenizer=tool_tokenizer(guarded)).report
    assert report.kept == 1 and "refused by the chat template" in str(report)


def test_a_plain_prompt_of_messages_is_what_the_user_says():
    tokenizer = tool_tokenizer()
    want = texts([CHAT], tokenizer)
    assert texts([CHAT | {"prompt": "Rain?"}], tokenizer) == want
    whole = {side: [*CHAT["prompt"], *CHAT[side]] for side in ("chosen", "rejected")}
    assert texts([whole | {"prompt": "Rain?"}], tokenizer) == want
    one = {"prompt": "Rain?", "completion": CHAT["chosen"], "label": True}
    assert texts([one], tokenizer) == [[want[0][0]]]


def test_a_list_that_lost_its_scores_is_left_out():
    row = {"prompt": "q", "responses": ["bad", "good"], "scores": [0, 1]}
    bare = {k: v for k, v in row.items() if k != "scores"}
    found = load(row, bare).report
    assert found.kept == 1 and "lacks scores (or ranks) where the first row has some" in str(found)
    assert load(bare, row).report.kept == 1
    assert load(bare, bare).report.kept == 2


def test_files_that_are_no_rows(tmp_path):
    import datasets

    (tmp_path / "a.json").write_text('[{"prompt": "a"},\n{"prompt": "b"}]')
    with pytest.raises(ValueError, match=r"begins a JSON array; write one object per line"):
        list(raw_rows(tmp_path / "a.json"))
    datasets.Dataset.from_dict({"chosen": [], "rejected": []}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no rows"):
        load_examples(str(tmp_path / "none"), tokenizer=byte_tokenizer())
    (tmp_path / "none" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"is not a whole folder of Dataset\.save_to_disk"):
        load_examples(str(tmp_path / "none"), tokenizer=byte_tokenizer())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        load_examples(str(tmp_path / "empty.jsonl"), tokenizer=byte_tokenizer())
