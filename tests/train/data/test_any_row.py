"""Rows of any shape: kept, or left out with a line and a column; no exception of another kind, and
never a row that is kept without its text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import byte_tokenizer

from prefkern.train.data import collate, load_examples

PLAIN, CHAT = byte_tokenizer(), byte_tokenizer(chat=True)
CHAT.chat_template = (
    "{% for t in tools or [] %}T{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{% if m.role in ('system', 'user', 'assistant') %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
QUICK = settings(max_examples=150, deadline=None, database=None)

words = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["", " ", "</s>", "Human: a", "\ud800", "a b", "{{ x }}"]
)
numbers = st.integers(-(2**70), 2**70) | st.floats() | st.booleans()
scalars = st.none() | numbers | words | st.binary(max_size=4)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": words, "arguments": anything})}
    ),
    max_size=2,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | scalars},
        optional={"content": words | scalars, "tool_calls": calls | anything, "name": scalars},
    ),
    max_size=3,
)
texts = words | messages | anything
beside = {
    "weight": numbers | scalars, "question": texts, "images": anything, "tools": anything,
    "chat_template_kwargs": anything, "chosen_weights": anything, "prompt_rejected": texts,
    "ref_chosen_logps": scalars, "ref_rejected_logps": scalars, "stage": scalars, "id": scalars,
}  # fmt: skip
# Rows that can be used, of which any column may be something else, or gone.
word = st.text("abcxyz ", min_size=1, max_size=8).map(lambda text: "w" + text)
said = st.builds(lambda text: [{"role": "assistant", "content": text}], word)
asked = st.builds(lambda text: [{"role": "user", "content": text}], word)


def bent(good, others):
    """`good` with up to two of its columns, or of `others`, replaced or left out."""
    changes = st.dictionaries(st.sampled_from(sorted(others)), st.integers(0, 1), max_size=2)

    @st.composite
    def row(draw):
        made = dict(draw(good))
        for name, how in draw(changes).items():
            if how:
                made[name] = draw(others[name])
            else:
                made.pop(name, None)
        return made

    return row()


def of(**columns):
    return st.fixed_dictionaries(columns)


pairs = bent(
    of(prompt=word, chosen=word.map(lambda x: x + "1"), rejected=word)
    | of(prompt=asked, chosen=said.map(lambda x: x * 2), rejected=said),
    {"prompt": texts, "chosen": texts, "rejected": texts, **beside},
)
singles = bent(
    of(prompt=word, completion=word, label=st.booleans())
    | of(prompt=asked | word, completion=said, label=st.booleans()),
    {"prompt": texts, "completion": texts, "label": scalars, **beside},
)
scores = st.lists(numbers, max_size=4) | anything
lists = bent(
    of(
        prompt=word,
        responses=st.lists(word, min_size=3, max_size=3, unique=True),
        scores=st.lists(st.floats(-9, 9), min_size=3, max_size=3, unique=True),
    ),
    {"prompt": texts, "responses": st.lists(texts, max_size=4) | anything, "scores": scores,
     "ranks": scores, **beside},
)  # fmt: skip
GOOD = {
    "pairs": {"prompt": "q", "chosen": "yes", "rejected": "no"},
    "unpaired": {"prompt": "q", "completion": "yes", "label": True},
    "lists": {"prompt": "q", "responses": ["a", "b"], "scores": [0, 1]},
}


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize(
    ("layout", "rows"), [("pairs", pairs), ("unpaired", singles), ("lists", lists)]
)
def test_any_row(layout, rows, tokenizer):
    @QUICK
    @given(rows)
    def check(row):
        good = GOOD[layout]
        try:
            found = load_examples([good, row, good], tokenizer=tokenizer, layout=layout)
        except ValueError as refused:  # of the whole data set: pictures, a question not read
            assert "data[1]" in str(refused) or "chat template" in str(refused)
            return
        report = found.report
        assert report.kept + report.total == report.rows == 3
        assert report.kept >= 2, str(report)  # its neighbours stay
        if report.kept == 2:
            assert report.examples[0].startswith("data[1]")
        batch = collate(found.examples)
        for example in found.examples:
            assert math.isfinite(example.weight) and example.weight >= 0
            assert all(math.isfinite(label) for label in example.relevance or ())
            assert all(seq.length > 0 for seq in example.sequences)
        assert batch.num_scored == sum(s.length for e in found.examples for s in e.sequences)

    check()


@QUICK
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=2, max_size=5),
    st.sampled_from([(0.0, 30.0), None]),
)
def test_labels_of_any_scale(values, label_range):
    """Kept as they are within the range, else the order alone, and said; equal ones equal."""
    row = {"prompt": "q", "responses": [f"r{i}" for i in range(len(values))], "scores": values}
    try:
        found = load_examples(
            [row], tokenizer=PLAIN, list_labels="auto", label_range=label_range,
            shuffle_lists=False,
        )  # fmt: skip
    except ValueError as refused:
        assert len(set(values)) == 1 and "all equal" in str(refused)
        return
    labels = found.examples[0].relevance
    inside = label_range is None or all(0 <= v <= 30 for v in values)
    assert found.report.ordered == (not inside) == bool(found.report.notes)
    assert labels == (
        tuple(values) if inside else tuple(sorted(set(values)).index(v) for v in values)
    )
