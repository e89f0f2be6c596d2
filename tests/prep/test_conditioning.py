"""Scores, directions, quality words and system messages in front of a prompt."""

from __future__ import annotations

import copy
import math

import pytest

from prefkern.prep import (
    control_prefix,
    direction_conditioned,
    pairs_from_lists,
    score_conditioned,
    system_messages,
)

PAIR = {
    "prompt": "p",
    "chosen": "good",
    "rejected": "poor",
    "chosen_score": 8.0,
    "rejected_score": 4.5,
}
USER = {"role": "user", "content": "hi"}


def system(text):
    return {"role": "system", "content": text}


# ---- scores -------------------------------------------------------------------------------------


def test_two_pairs_per_pair(check):
    swapped = {
        "prompt": "target 4.5\n\np",
        "chosen": "poor",
        "rejected": "good",
        "chosen_score": 4.5,
        "rejected_score": 8.0,
    }
    expected = [PAIR | {"prompt": "target 8\n\np"}, swapped]
    check(score_conditioned, [PAIR], expected, template="target {score}")


def test_every_column_of_a_side_is_swapped():
    row = {
        "prompt": "p",
        "chosen": "good",
        "rejected": "poor",
        "score_of_chosen": 2,
        "score_of_rejected": 1,
        "chosen_weights": [1.0, 0.5],
        "rejected_weights": [0.25],
    }
    columns = {"chosen_score": "score_of_chosen", "rejected_score": "score_of_rejected"}
    _, second = score_conditioned([row], **columns)
    assert second["chosen_weights"] == [0.25] and second["rejected_weights"] == [1.0, 0.5]
    assert second["score_of_chosen"] == 1 and second["score_of_rejected"] == 2


def test_a_conversation_gets_a_system_message_of_its_own():
    row = PAIR | {"prompt": [USER], "chosen": [USER], "rejected": [USER, USER]}
    before = copy.deepcopy(row)
    first, second = score_conditioned([row], template="target {score}")
    assert first["prompt"] == [system("target 8"), USER]
    assert second["prompt"] == [system("target 4.5"), USER]
    assert first["prompt"] is not second["prompt"] and row == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_score": 8.0}, "'rejected_score': must be below chosen_score = 8, got 8"),
        ({"rejected_score": 9.0}, "'rejected_score': must be below"),
        ({"rejected_score": 7.9999999}, "'rejected_score': and chosen_score both print as 8"),
        ({"chosen_score": math.nan}, "'chosen_score': must be finite, got nan"),
        ({"chosen_score": None}, "'chosen_score': is null"),
        ({"rejected": "good"}, "'rejected': is the same as chosen"),
        ({"ref_chosen_logps": -3.0}, "'ref_chosen_logps': was computed for another prompt"),
        ({"pref_prob": 0.7}, "'pref_prob': is the strength of the given order only"),
        ({"chosen_weights": [1.0]}, "'chosen_weights': has no counterpart 'rejected_weights'"),
    ],
)
def test_bad_scored_pairs(change, message):
    with pytest.raises(ValueError, match="row 0, column " + message):
        score_conditioned([PAIR | change])


@pytest.mark.parametrize("template", ["no field", "{score} {other}", "{}"])
def test_bad_template(template):
    with pytest.raises(ValueError, match=r"template must hold the field \{score\}"):
        score_conditioned([PAIR], template=template)


# ---- directions ---------------------------------------------------------------------------------

REWARDED = {"prompt": "p", "completions": ["A", "B"], "rewards": [[1.0, 0.5], [0.5, -1.0]]}


def test_directions(check):
    # (1, 0): A 1, B 0.5. (0.6, -0.8): A 0.6 - 0.4 = 0.2, B 0.3 + 0.8 = 1.1.
    expected = [
        {
            "prompt": "maximise help*100 + length*0\n\np",
            "completions": ["A", "B"],
            "scores": [1.0, 0.5],
            "direction": [1.0, 0.0],
        },
        {
            "prompt": "maximise help*60 + length*-80\n\np",
            "completions": ["A", "B"],
            "scores": [pytest.approx(0.2), pytest.approx(1.1)],
            "direction": [0.6, -0.8],
        },
    ]
    check(
        direction_conditioned,
        [REWARDED],
        expected,
        [(1.0, 0.0), (0.6, -0.8)],
        objectives=("help", "length"),
        template="maximise {weights}",
    )


def test_the_best_answer_depends_on_the_direction():
    lists = direction_conditioned(
        [REWARDED], [(1.0, 0.0), (0.6, -0.8)], objectives=("help", "length")
    )
    pairs = pairs_from_lists(lists, pairs="best_vs_worst")
    assert [row["chosen"] for row in pairs] == ["A", "B"]


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ([(1.0, 1.0)], r"directions\[0\] must have length 1 within 0.01, got 1.41421"),
        ([(1.0, 0.0), (1.0,)], r"directions\[1\] must hold 2 numbers"),
        ([(math.nan, 0.0)], "must have length 1"),
        ([], "at least one vector"),
    ],
)
def test_bad_directions(directions, message):
    with pytest.raises(ValueError, match=message):
        direction_conditioned([REWARDED], directions, objectives=("a", "b"))


def test_bad_rewards():
    row = REWARDED | {"rewards": [[1.0, 2.0], [1.0, math.inf]]}
    with pytest.raises(ValueError, match=r"row 0, column 'rewards\[1\]': must be finite, got inf"):
        direction_conditioned([row], [(1.0, 0.0)], objectives=("a", "b"))


# ---- control prefixes ---------------------------------------------------------------------------


def test_control_prefixes_of_a_pair(check):
    row = {"prompt": "p", "chosen": "good", "rejected": "poor"}
    expected = [
        {"prompt": "[+] p", "chosen": "good", "rejected": "poor"},
        {"prompt": "[-] p", "chosen": "poor", "rejected": "good"},
    ]
    options = {"good_prefix": "[+]", "bad_prefix": "[-]", "separator": " "}
    check(control_prefix, [row], expected, **options)


def test_control_prefixes_of_single_answers(check):
    rows = [{"prompt": "p", "completion": c, "label": c == "good"} for c in ("good", "poor")]
    expected = [
        {"prompt": "[+] p", "completion": "good"},
        {"prompt": "[-] p", "completion": "poor"},
    ]
    options = {"good_prefix": "[+]", "bad_prefix": "[-]", "separator": " "}
    check(control_prefix, rows, expected, **options)


def test_bad_control_prefixes():
    with pytest.raises(ValueError, match="two different texts"):
        control_prefix([PAIR], good_prefix="x", bad_prefix="x")
    row = {"prompt": "p", "completion": "c", "label": 1}
    with pytest.raises(ValueError, match="row 0, column 'label': must be true or false, got int"):
        control_prefix([row], good_prefix="x", bad_prefix="y")


# ---- system messages ----------------------------------------------------------------------------


def test_system_messages(check):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "system": "Be brief."},
        {"prompt": "q", "chosen": "a", "rejected": "b", "system": "Be kind."},
    ]
    expected = [
        {"prompt": "Be brief.\n\np", "chosen": "a", "rejected": "b"},
        {"prompt": "Be kind.\n\nq", "chosen": "a", "rejected": "b"},
    ]
    check(system_messages, rows, expected)


def test_system_messages_of_conversations():
    rows = [
        {"prompt": [USER], "system": "Be brief."},
        {"prompt": [system("You are X."), USER], "system": "Be kind."},
    ]
    before = copy.deepcopy(rows)
    found = system_messages(rows)
    assert found[0]["prompt"] == [system("Be brief."), USER]
    assert found[1]["prompt"] == [system("Be kind.\n\nYou are X."), USER]
    assert rows == before


def test_bad_system_messages():
    with pytest.raises(ValueError, match="row 1, column 'system': has no text"):
        system_messages([{"prompt": "p", "system": "s"}, {"prompt": "p", "system": " "}])
    with pytest.raises(ValueError, match="row 0, column 'system': is missing"):
        system_messages([{"prompt": "p"}])
