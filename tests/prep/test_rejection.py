"""Statistical rejection sampling and tournaments."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prefkern.prep import rejection_sample, tournament_pairs
from prefkern.prep.rejection import accept

POOL = {"prompt": "p", "completions": ["A", "B", "C", "D"], "scores": [0.0, 1.0, 0.5, -2.0]}


def test_acceptance_by_hand():
    # beta 0.5. Pass 1, R_max = 1: thresholds e^-2 = 0.135, 1, e^-1 = 0.368, e^-6 = 0.0025;
    # draws 0.1 (accept 0), 0.9 (accept 1), 0.5, 0.5. Pass 2, R_max = 0.5: 1, e^-5; accept 2.
    draws = iter([0.1, 0.9, 0.5, 0.5, 0.99])
    assert accept(POOL["scores"], 3, 0.5, lambda: next(draws)) == [0, 1, 2]
    assert next(draws, None) is None  # stops at the third, before the last candidate is drawn


def test_the_maximum_is_taken_when_a_pass_begins():
    # B is accepted first; A is still judged against it, at e^-2 = 0.135, and not against 0.5.
    draws = iter([0.5, 0.5, 0.14, 0.5, 0.5])
    assert accept([1.0, 0.5, 0.0, -2.0], 2, 0.5, lambda: next(draws)) == [0, 1]


def test_low_temperature_takes_the_best_in_order(check):
    expected = {"prompt": "p", "completions": ["B", "C", "A"], "scores": [1.0, 0.5, 0.0]}
    check(rejection_sample, [POOL], [expected], num_samples=3, beta=1e-6)


def test_infinite_temperature_takes_the_first(check):
    expected = {"prompt": "p", "completions": ["A", "B"], "scores": [0.0, 1.0]}
    check(rejection_sample, [POOL], [expected], num_samples=2, beta=math.inf)


def test_seed_and_row_decide():
    pool = {
        "prompt": "p",
        "completions": [str(i) for i in range(64)],
        "scores": [math.sin(i) for i in range(64)],
        "i": list(range(64)),
    }
    options = {"num_samples": 8, "beta": 0.5, "aligned": ("i",)}
    first, second = rejection_sample([pool, pool], **options)
    assert first != second  # every row has draws of its own
    assert rejection_sample([pool], **options) == [first]
    assert rejection_sample([pool], seed=1, **options) != [first]
    assert first["scores"] == [math.sin(i) for i in first["i"]]
    assert len(set(first["completions"])) == 8


def test_the_first_accepted_follow_the_tilted_distribution():
    # One accepted candidate per pass start: P(first pass accepts i) = exp((R_i - R_max) / beta).
    scores, beta, n = [0.0, 0.5, 1.0], 1.0, 4000
    uniform = np.random.default_rng(3).random
    counts = np.zeros(3)
    for _ in range(n):
        # three accepted in one pass or more: index 2 is always in the first pass
        first_pass = [i for i in accept(scores, 3, beta, uniform) if i < 2]
        counts[first_pass[0]] += 1
    # 0 comes before 1 where pass 1 takes 0 (e^-1), or takes neither and pass 2 takes 0 (e^-0.5).
    a, b, c = math.exp(-1.0), math.exp(-0.5), math.exp(-0.5)
    expected = a + (1 - a) * (1 - b) * c
    assert abs(counts[0] / n - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 5}, "row 0, column 'completions': holds 4 candidates where num_samples=5"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_samples": 2, "beta": 0.0}, "beta must be > 0, got 0.0"),
        ({"num_samples": 2, "beta": float("nan")}, "beta must be > 0, got nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        rejection_sample([POOL], **options)


def test_repeated_candidates_are_refused():
    row = POOL | {"completions": ["A", "B", "A", "D"]}
    with pytest.raises(ValueError, match=r"repeats.*drop_duplicates"):
        rejection_sample([row], num_samples=2)


# ---- tournaments --------------------------------------------------------------------------------

FIVE = {"prompt": "p", "completions": list("ABCDE"), "scores": [1.0, 3.0, 2.0, 2.0, 4.0]}


def match(chosen, rejected, high, low, played):
    return {
        "prompt": "p",
        "chosen": chosen,
        "rejected": rejected,
        "chosen_score": high,
        "rejected_score": low,
        "round": played,
    }


def test_first_round(check):
    # C and D tie, E has no partner.
    check(tournament_pairs, [FIVE], [match("B", "A", 3.0, 1.0, 0)])


def test_all_rounds(check):
    # Round 0: B, C (tie, the earlier), E alone; round 1: B beats C, E alone; round 2: E beats B.
    expected = [
        match("B", "A", 3.0, 1.0, 0),
        match("B", "C", 3.0, 2.0, 1),
        match("E", "B", 4.0, 3.0, 2),
    ]
    check(tournament_pairs, [FIVE], expected, rounds="all")


@pytest.mark.parametrize("n", range(2, 10))
def test_number_of_pairs(n):
    row = {"prompt": "p", "completions": [str(i) for i in range(n)], "scores": list(range(n))}
    assert len(tournament_pairs([row])) == n // 2
    assert len(tournament_pairs([row], rounds="all")) == n - 1


def test_a_tournament_of_ties():
    tied = FIVE | {"scores": [1.0, 1.0, 2.0, 2.0, 3.0]}
    with pytest.raises(ValueError, match="row 0, column 'scores': every meeting is a tie"):
        tournament_pairs([tied])
    assert len(tournament_pairs([tied, FIVE], ties="skip")) == 1
    with pytest.raises(ValueError, match="rounds must be one of first, all, got 'two'"):
        tournament_pairs([FIVE], rounds="two")
