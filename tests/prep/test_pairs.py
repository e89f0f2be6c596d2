"""Pairs from ranked lists, from judgements, and distinct responses."""

from __future__ import annotations

import subprocess
import sys
from types import MappingProxyType

import pytest

from prefkern.prep import drop_duplicates, pairs_from_judgements, pairs_from_lists
from prefkern.prep.table import read_rows

# Ranking: C 3, A 2, D 2, B 1; A before D by position.
LIST = {"prompt": "p", "completions": ["A", "B", "C", "D"], "scores": [2.0, 1.0, 3.0, 2.0]}
SCORE = dict(zip(LIST["completions"], LIST["scores"], strict=True))


def rows(*pairs):
    return [
        {
            "prompt": "p",
            "chosen": w,
            "rejected": r,
            "chosen_score": SCORE[w],
            "rejected_score": SCORE[r],
        }
        for w, r in pairs
    ]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("all", ["CA", "CD", "CB", "AB", "DB"]),
        ("best_vs_rest", ["CA", "CD", "CB"]),
        ("adjacent", ["CA", "DB"]),
        ("best_vs_worst", ["CB"]),
    ],
)
def test_pairs_of_one_list(check, pairs, expected):
    check(pairs_from_lists, [LIST], rows(*expected), pairs=pairs)


def test_other_columns_are_carried_and_aligned_ones_split(check):
    row = LIST | {"source": "s", "logps": [-1.0, -2.0, -3.0, -4.0]}
    (plain,) = rows("CB")
    expected = plain | {"source": "s", "chosen_logps": -3.0, "rejected_logps": -2.0}
    check(pairs_from_lists, [row], [expected], pairs="best_vs_worst", aligned=("logps",))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completions": ["A", "B"], "ranks": [2, 1]},
        {"prompt": "p", "responses": ["B", "A"]},
        {
            "context": "p",
            "completions": [{"rank": 1, "completion": "A"}, {"rank": 0, "completion": "B"}],
        },
    ],
)
def test_ranks_and_order_count_downwards(row):
    expected = {
        "prompt": "p",
        "chosen": "B",
        "rejected": "A",
        "chosen_score": 1.0,
        "rejected_score": 0.0,
    }
    assert pairs_from_lists([row]) == [expected]


def test_conversations():
    a, b = ([{"role": "assistant", "content": text}] for text in "ab")
    prompt = [{"role": "user", "content": "hi"}]
    (pair,) = pairs_from_lists([{"prompt": prompt, "completions": [a, b], "scores": [0, 1]}])
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (prompt, b, a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0, 1.0, 1.0, 1.0]}, r"row 1, column 'scores': all are 1.0"),
        ({"scores": [1.0, float("nan"), 2.0, 3.0]}, r"'scores\[1\]': must be finite, got nan"),
        ({"scores": [1.0, True, 2.0, 3.0]}, r"'scores\[1\]': must be a number, got bool"),
        ({"scores": [1.0]}, "'scores': must hold 4 entries, one per response, got 1"),
        ({"scores": None}, "'scores': is missing, and so is ranks"),
        ({"ranks": [0, 1, 2, 3]}, "'ranks': stands beside scores"),
        ({"completions": ["A"], "scores": [1.0]}, "'completions': must hold at least 2"),
        ({"completions": ["A", "B", "A", "D"]}, r"'completions\[2\]': repeats completions\[0\]"),
        ({"completions": ["A", " ", "C", "D"]}, r"'completions\[1\]': has no text"),
        ({"completions": "A"}, "'completions': must be a list, got str"),
        ({"prompt": None}, "'prompt': is null"),
    ],
)
def test_bad_lists_name_row_and_column(change, message):
    with pytest.raises(
        ValueError, match="row 1, column.*" + message.removeprefix("row 1, column ")
    ):
        pairs_from_lists([LIST, LIST | change])


def test_an_aligned_column_has_an_entry_for_every_response():
    row = LIST | {"logps": [-1.0, -2.0, -3.0, -4.0, -5.0]}
    message = "row 0, column 'logps': must hold 4 entries, one per response, got 5"
    with pytest.raises(ValueError, match=message):
        pairs_from_lists([row], aligned=("logps",))


def test_lists_without_preference_can_be_skipped():
    tied = LIST | {"scores": [1.0] * 4}
    assert pairs_from_lists([tied, LIST], pairs="best_vs_worst", ties="skip") == rows("CB")
    with pytest.raises(ValueError, match="no row is left"):
        pairs_from_lists([tied], ties="skip")


def test_bad_options():
    with pytest.raises(ValueError, match=r"pairs must be one of all, .* got 'some'"):
        pairs_from_lists([LIST], pairs="some")
    with pytest.raises(ValueError, match="ties must be one of"):
        pairs_from_lists([LIST], ties="drop")


def test_rows_are_read_as_dictionaries_of_their_own():
    table = [{"a": 1}, MappingProxyType({"a": 2})]
    rows = read_rows(table)
    assert rows == [{"a": 1}, {"a": 2}] and [type(row) for row in rows] == [dict, dict]
    rows[0]["a"] = 3
    assert table[0] == {"a": 1}


def test_tables():
    with pytest.raises(ValueError, match="no rows"):
        read_rows([])
    with pytest.raises(ValueError, match="row 1: must be a mapping, got str"):
        read_rows([{}, "x"])
    with pytest.raises(ValueError, match="one split of a DatasetDict"):
        read_rows({"train": []})
    with pytest.raises(ValueError, match="got str"):
        read_rows("file.jsonl")


def test_importing_the_package_leaves_datasets_alone():
    code = "import sys, prefkern.prep; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- judgements ---------------------------------------------------------------------------------

# Means: A (0.9 + 0.6) / 2 = 0.75, B (0.1 + 0.3) / 2 = 0.2, C (0.4 + 0.7) / 2 = 0.55.
JUDGED = {
    "prompt": "p",
    "completions": ["A", "B", "C"],
    "pref_probs": [[0.5, 0.9, 0.6], [0.1, 0.5, 0.3], [0.4, 0.7, 0.5]],
}


def soft(chosen, rejected, q):
    return {"prompt": "p", "chosen": chosen, "rejected": rejected, "pref_prob": q}


def test_judged_pairs(check):
    ac, ab, cb = soft("A", "C", 0.6), soft("A", "B", 0.9), soft("C", "B", 0.7)
    check(pairs_from_judgements, [JUDGED], [ac, ab, cb])
    check(pairs_from_judgements, [JUDGED], [ac, cb], pairs="adjacent")
    check(pairs_from_judgements, [JUDGED], [ab], pairs="best_vs_worst")


def test_the_mean_ranks_even_against_the_judgement_of_a_pair():
    """Means: A (0.9 + 0.1) / 2 = 0.5, B (0.1 + 0.6) / 2 = 0.35, C (0.9 + 0.4) / 2 = 0.65."""
    matrix = [[None, 0.9, 0.1], [0.1, None, 0.6], [0.9, 0.4, None]]
    row = {"prompt": "p", "completions": ["A", "B", "C"], "pref_probs": matrix}
    wanted = [soft("C", "A", 0.9), soft("C", "B", 0.4), soft("A", "B", 0.9)]
    assert pairs_from_judgements([row]) == wanted


def test_a_tie_of_judgements_is_a_pair_at_one_half():
    row = {"prompt": "p", "completions": ["A", "B"], "pref_probs": [[None, 0.5], [0.5, None]]}
    assert pairs_from_judgements([row]) == [soft("A", "B", 0.5)]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0, 0.9], [0.2, 0]], r"row 0, column 'pref_probs\[0\]\[1\]': and \[1\]\[0\] must sum to"),
        ([[0, 1.2], [-0.2, 0]], r"'pref_probs\[0\]\[1\]': must be in \[0, 1\], got 1.2"),
        ([[0, float("nan")], [1, 0]], "must be finite"),
        ([[0, 1]], "must hold 2 entries"),
        ([[0, 1], [1]], r"'pref_probs\[1\]': must hold 2 probabilities"),
    ],
)
def test_bad_judgements(matrix, message):
    with pytest.raises(ValueError, match=message):
        pairs_from_judgements([{"prompt": "p", "completions": ["A", "B"], "pref_probs": matrix}])


# ---- duplicates ---------------------------------------------------------------------------------


def test_duplicates_keep_the_first(check):
    row = {"prompt": "p", "completions": ["A", "B", "A"], "scores": [1.0, 2.0, 1.0], "n": [7, 8, 9]}
    expected = {"prompt": "p", "completions": ["A", "B"], "scores": [1.0, 2.0], "n": [7, 8]}
    check(drop_duplicates, [row], [expected], aligned=("n",))


def test_duplicates_that_cannot_be_dropped():
    row = {"prompt": "p", "completions": ["A", "B", "A"], "scores": [1.0, 2.0, 3.0]}
    with pytest.raises(ValueError, match=r"row 0, column 'completions\[2\]': is the same as"):
        drop_duplicates([row])
    same = {"prompt": "p", "responses": ["A", "A"], "scores": [1.0, 1.0]}
    with pytest.raises(
        ValueError, match="row 0, column 'responses': one distinct response is left"
    ):
        drop_duplicates([same])
    assert len(drop_duplicates([same, LIST], ties="skip")) == 1
