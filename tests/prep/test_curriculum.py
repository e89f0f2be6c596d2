"""Stages from easy to hard, and triples."""

from __future__ import annotations

import pytest

from prefkern.prep import curriculum, split_stages, triples_from_lists

FOUR = {"prompt": "p", "completions": ["A", "B", "C", "D"], "scores": [4.0, 5.0, 2.0, 3.0]}
THREE = {"prompt": "q", "completions": ["X", "Y", "Z"], "scores": [1.0, 9.0, 9.0]}


def pair(prompt, chosen, rejected, high, low, stage, gap=None):
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_score": high,
        "rejected_score": low,
        "stage": stage,
        "gap": high - low if gap is None else gap,
    }


EASY_TO_HARD = [
    pair("p", "B", "C", 5.0, 2.0, 0),
    pair("q", "Y", "X", 9.0, 1.0, 0),  # Y and Z tie, so they form no pair
    pair("p", "B", "D", 5.0, 3.0, 1),
    pair("p", "B", "A", 5.0, 4.0, 2),
]


def test_easy_pairs_come_first(check):
    check(curriculum, [FOUR, THREE], EASY_TO_HARD)


def test_gap_from_another_column(check):
    # |-1 - g|: A 7, C 1, D 7: A and D tie, and D is ranked lower than A.
    row = FOUR | {"logps": [-8.0, -1.0, -2.0, -8.0]}
    carried = {"logps": row["logps"]}
    expected = [
        pair("p", "B", "D", 5.0, 3.0, 0, 7.0) | carried,
        pair("p", "B", "A", 5.0, 4.0, 1, 7.0) | carried,
        pair("p", "B", "C", 5.0, 2.0, 2, 1.0) | carried,
    ]
    found = curriculum([row], gap_column="logps")
    assert found == expected
    assert curriculum([row], gap_column="logps") == found
    with pytest.raises(ValueError, match="row 0, column 'logps': must hold 4 entries"):
        curriculum([FOUR | {"logps": [1.0]}], gap_column="logps")


def test_a_gap_is_a_distance():
    """Best B -4; from it A 3 up, C 5 down, D 2 down."""
    row = FOUR | {"logps": [-1.0, -4.0, -9.0, -6.0]}
    found = curriculum([row], gap_column="logps")
    assert [(r["rejected"], r["gap"]) for r in found] == [("C", 5.0), ("A", 3.0), ("D", 2.0)]


def test_stages_come_in_increasing_order_however_the_table_is_sorted():
    stages = split_stages(EASY_TO_HARD[::-1])
    assert stages == [EASY_TO_HARD[1::-1], EASY_TO_HARD[2:3], EASY_TO_HARD[3:]]


def test_stages_are_split():
    stages = split_stages(EASY_TO_HARD)
    assert [len(stage) for stage in stages] == [2, 1, 1]
    assert [row["stage"] for stage in stages for row in stage] == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="row 0, column 'stage': is missing"):
        split_stages([FOUR])
    with pytest.raises(ValueError, match=r"must be a whole number, got 0\.5"):
        split_stages([{"stage": 0.5}])


def test_stages_of_a_dataset_are_datasets():
    datasets = pytest.importorskip("datasets")
    stages = split_stages(curriculum(datasets.Dataset.from_list([FOUR, THREE])))
    assert [type(stage) for stage in stages] == [datasets.Dataset] * 3


def test_curriculum_refuses_ties_over_the_whole_list():
    with pytest.raises(ValueError, match=r"row 0, column 'scores': all are 1\.0"):
        curriculum([THREE | {"scores": [1.0, 1.0, 1.0]}])


# ---- triples ------------------------------------------------------------------------------------

TRIPLE = {
    "prompt": "p",
    "chosen": "A",
    "rejected": "C",
    "chosen_score": 4.0,
    "rejected_score": 2.0,
    "gold": "B",
    "gold_score": 5.0,
}


def test_triples(check):
    check(triples_from_lists, [FOUR], [TRIPLE])


def test_triples_under_trls_name():
    (row,) = triples_from_lists([FOUR], gold_column="reference")
    assert row["reference"] == "B" and "gold" not in row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (THREE, "row 0, column 'scores': first, second and last must differ, got 9.0, 9.0, 1.0"),
        (THREE | {"scores": [1.0, 9.0, 1.0]}, "got 9.0, 1.0, 1.0"),
        ({"prompt": "p", "completions": ["A", "B"], "scores": [0, 1]}, "at least 3 responses"),
    ],
)
def test_triples_that_are_not_determined(row, message):
    with pytest.raises(ValueError, match=message):
        triples_from_lists([row])


def test_undetermined_triples_can_be_skipped():
    assert triples_from_lists([THREE, FOUR], ties="skip") == [TRIPLE]
