"""Programs and tests that rank each other, and run times."""

from __future__ import annotations

import pytest

from prefkern.prep import mutual_scores, pairs_from_lists, rank_by_run_time, rank_programs

PASSED = [[1, 1], [1, 0], [0, 0]]


def test_one_round_by_hand():
    # c = 0.5 + 0.5 * (2, 1, 0) = (1.5, 1, 0.5); t = 0.5 + 0.5 * (2, 1) = (1.5, 1).
    assert mutual_scores(PASSED, damping=0.5, rounds=1) == ([1.5, 1.0, 0.5], [1.5, 1.0])


def test_two_rounds_by_hand():
    # c = (0.75 + 0.5 * 2.5, 0.5 + 0.5 * 1.5, 0.25); t = (0.75 + 0.5 * 2.5, 0.5 + 0.5 * 1.5).
    assert mutual_scores(PASSED, damping=0.5, rounds=2) == ([2.0, 1.25, 0.25], [2.0, 1.25])


def test_limits():
    assert mutual_scores(PASSED, rounds=0) == ([1.0] * 3, [1.0] * 2)
    assert mutual_scores(PASSED, damping=0.0) == ([1.0] * 3, [1.0] * 2)
    assert mutual_scores(PASSED, damping=1.0, rounds=1) == ([2.0, 1.0, 0.0], [2.0, 1.0])


def test_a_test_that_many_pass_counts_more():
    # Programs 0 and 1 pass one test each; test 0 is passed by program 2 as well.
    programs, tests = mutual_scores([[1, 0], [0, 1], [1, 0]])
    assert programs[0] > programs[1] and tests[0] > tests[1]


def test_table(check):
    row = {"prompt": "p", "completions": ["A", "B", "C"], "passed": PASSED}
    expected = row | {"scores": [1.5, 1.0, 0.5], "test_scores": [1.5, 1.0]}
    check(rank_programs, [row], [expected], damping=0.5, rounds=1)
    pairs = pairs_from_lists(rank_programs([row]), pairs="best_vs_worst")
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("A", "C")


@pytest.mark.parametrize("stored", [{"ranks": [0, 1, 2]}, {"scores": [7.0, 8.0, 9.0]}])
def test_the_scores_replace_those_of_the_list(stored):
    row = {"prompt": "p", "completions": ["A", "B", "C"], "passed": PASSED}
    wanted = row | {"scores": [1.5, 1.0, 0.5], "test_scores": [1.5, 1.0]}
    assert rank_programs([row | stored], damping=0.5, rounds=1) == [wanted]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 1.5}, r"damping must be in \[0, 1\], got 1.5"),
        ({"damping": float("nan")}, "damping"),
        ({"rounds": -1}, "rounds must be at least 0"),
        ({"rounds": 2000}, "scores overflow after 2000 rounds"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        mutual_scores(PASSED, **options)


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ([[1, 1], [1]], r"row 0, column 'passed\[1\]': must hold one entry per test"),
        ([[1, 1]], "'passed': must hold 2 entries"),
        ([[1, 2], [0, 0]], r"'passed\[0\]': must hold 0, 1 or booleans only"),
        ([[1, float("nan")], [0, 0]], "must hold 0, 1 or booleans only"),
        ([[], []], "must hold one entry per test"),
    ],
)
def test_bad_matrices(passed, message):
    with pytest.raises(ValueError, match=message):
        rank_programs([{"prompt": "p", "completions": ["A", "B"], "passed": passed}])


def test_run_time(check):
    row = {
        "prompt": "p",
        "completions": ["A", "B", "C"],
        "passed": [[1, 1], [0, 1], [1, 1]],
        "seconds": [2.0, 0.1, 0.5],
    }
    expected = {"prompt": "p", "completions": ["A", "C"], "scores": [-2.0, -0.5]}
    check(rank_by_run_time, [row], [expected])
    slow = row | {"passed": [[1, 1], [0, 1], [0, 1]]}
    with pytest.raises(ValueError, match="row 1, column 'passed': 1 programs pass every test"):
        rank_by_run_time([row, slow])
    assert rank_by_run_time([row, slow], ties="skip") == [expected]
    with pytest.raises(ValueError, match="row 0, column 'seconds': must be at least 0"):
        rank_by_run_time([row | {"seconds": [1.0, -1.0, 1.0]}])
