"""Where two answers part, and how sure the search was."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_tokenizer import byte_tokenizer

from prefkern.prep import divergence_weights, pairs_from_lists, shared_steps_to_prompt, visit_labels


def test_weights_begin_at_the_first_differing_token(check):
    row = {"chosen_ids": [5, 6, 7, 8, 2], "rejected_ids": [5, 6, 9, 2]}
    weights = {
        "chosen_weights": [0.0, 0.0, 1.0, 1.0, 1.0],
        "rejected_weights": [0.0, 0.0, 1.0, 1.0],
    }
    check(divergence_weights, [row], [row | weights])


def test_weights_from_text_fit_the_trainer():
    pytest.importorskip("tokenizers")
    from prefkern.train.data import Loader

    tokenizer = byte_tokenizer()
    row = {"prompt": "2 + 2 =", "chosen": " fifty", "rejected": " four"}
    (weighted,) = divergence_weights([row], tokenizer=tokenizer)
    # The answers share " f"; the prompt ends before it. EOS is the last of each.
    assert weighted["chosen_weights"] == [0.0, 0.0] + [1.0] * 5
    assert weighted["rejected_weights"] == [0.0, 0.0] + [1.0] * 4
    (example,) = Loader(tokenizer=tokenizer).load([weighted]).examples
    for sequence, name in zip(example.sequences, ("chosen", "rejected"), strict=True):
        np.testing.assert_array_equal(sequence.token_weights, weighted[f"{name}_weights"])


def test_answers_begin_where_the_prompt_ends_in_both():
    """Only the chosen text has the token "pa": both answers begin before the prompt's p."""
    pytest.importorskip("tokenizers")
    from prefkern.train.data import Loader

    tokenizer = byte_tokenizer((("p", "a"),))
    row = {"prompt": "xp", "chosen": "a", "rejected": "b"}
    (weighted,) = divergence_weights([row], tokenizer=tokenizer)
    assert weighted["chosen_weights"] == [1.0] * 2  # pa, EOS
    assert weighted["rejected_weights"] == [1.0] * 3  # p, b, EOS
    (example,) = Loader(tokenizer=tokenizer).load([weighted]).examples
    assert [s.completion_start for s in example.sequences] == [1, 1]
    assert [len(s.input_ids) for s in example.sequences] == [3, 4]


def test_one_answer_may_begin_with_the_other_where_the_end_token_differs():
    row = {"prompt": "p", "chosen": " ab", "rejected": " abc"}
    (found,) = divergence_weights([row], tokenizer=byte_tokenizer())
    assert found["chosen_weights"] == [0.0, 0.0, 0.0, 1.0]
    assert found["rejected_weights"] == [0.0, 0.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="row 0, column 'chosen': has no token that differs"):
        divergence_weights([row], tokenizer=byte_tokenizer(), append_eos=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen_ids": [1, 2], "rejected_ids": [1, 2]}, "'chosen_ids': has no token that differs"),
        ({"chosen_ids": [1, 2, 3], "rejected_ids": [1]}, "'rejected_ids': has no token that"),
        ({"chosen_ids": [1]}, "'rejected_ids': is missing"),
        ({"chosen_ids": [1.0], "rejected_ids": [2]}, r"'chosen_ids\[0\]': must be int, got float"),
        (
            {"chosen_ids": [1], "rejected_ids": [2], "chosen_weights": [1.0]},
            "'chosen_weights': is there already",
        ),
    ],
)
def test_bad_ids(row, message):
    with pytest.raises(ValueError, match="row 0, column " + message):
        divergence_weights([row])


def test_shared_steps(check):
    row = {
        "prompt": "Q:",
        "chosen_steps": [" a.", " b.", " c."],
        "rejected_steps": [" a.", " x."],
    }
    expected = {"prompt": "Q: a.", "chosen": " b. c.", "rejected": " x.", "num_shared": 1}
    check(shared_steps_to_prompt, [row], [expected])


@pytest.mark.parametrize(("shared", "prompt"), [([], "Q\n"), (["a"], "Q\na\n")])
def test_joint_of_steps(shared, prompt):
    row = {"prompt": "Q", "chosen_steps": [*shared, "b", "c"], "rejected_steps": [*shared, "x"]}
    (found,) = shared_steps_to_prompt([row], joint="\n")
    assert (found["prompt"], found["chosen"], found["rejected"]) == (prompt, "b\nc", "x")
    assert found["prompt"] + found["chosen"] == "\n".join(["Q", *row["chosen_steps"]])


def test_bad_steps():
    row = {"prompt": "Q", "chosen_steps": ["a", "b"], "rejected_steps": ["a"]}
    with pytest.raises(ValueError, match="row 0, column 'rejected_steps': its 1 steps begin"):
        shared_steps_to_prompt([row])
    with pytest.raises(ValueError, match=r"'chosen_steps\[0\]': must be str, got int"):
        shared_steps_to_prompt([row | {"chosen_steps": [1]}])


def test_visit_labels(check):
    # 1 / (1 + 2 / 6) = 0.75; 1 / (1 + 6 / 2) = 0.25 -> 0.5; 1 / (1 + 3 / max(1, 0)) = 0.25 -> 0.5;
    # 1 / (1 + 0) = 1.
    counts = [(6.0, 2.0), (2.0, 6.0), (0.0, 3.0), (4.0, 0.0)]
    rows = [{"chosen_visits": a, "rejected_visits": b} for a, b in counts]
    labels = [0.75, 0.5, 0.5, 1.0]
    expected = [row | {"pref_prob": q} for row, q in zip(rows, labels, strict=True)]
    check(visit_labels, rows, expected)


def test_visits_of_siblings_become_labels():
    node = {"prompt": "p", "completions": ["a", "b"], "scores": [0.1, 0.9], "visits": [1, 3]}
    (pair,) = visit_labels(pairs_from_lists([node], aligned=("visits",)))
    assert pair["chosen"] == "b" and pair["pref_prob"] == pytest.approx(0.75)


@pytest.mark.parametrize("value", [-1, float("nan"), None, "3"])
def test_bad_visits(value):
    with pytest.raises(ValueError, match="row 0, column 'rejected_visits'"):
        visit_labels([{"chosen_visits": 1, "rejected_visits": value}])
