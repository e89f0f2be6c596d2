"""Annotator and weight columns."""

from __future__ import annotations

import pytest

from prefkern.prep import (
    number_annotators,
    pair_weights,
    pairs_per_annotator,
    token_weights,
    with_reliability,
)

VOTES = {
    "prompt": "p",
    "completions": ["A", "B"],
    "annotations": [
        {"annotator": "zoe", "preferred": 1},
        {"annotator": "ann", "preferred": 0},
        {"annotator": "tom", "preferred": None},
    ],
}


def vote(chosen, rejected, name):
    return {"prompt": "p", "chosen": chosen, "rejected": rejected, "annotator": name}


def test_one_pair_per_annotator(check):
    check(pairs_per_annotator, [VOTES], [vote("B", "A", "zoe"), vote("A", "B", "ann")])


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([{"annotator": "ann"}], r"'annotations\[0\]': must hold annotator and preferred"),
        ([{"annotator": "ann", "preferred": 2}], "preferred must be 0, 1 or null, got 2"),
        ([{"annotator": "ann", "preferred": True}], "preferred must be 0, 1 or null, got True"),
        ([{"annotator": " ", "preferred": 1}], r"'annotations\[0\].annotator': must be a name"),
        ([{"annotator": "ann", "preferred": 1}] * 2, "annotator 'ann' has two labels"),
    ],
)
def test_bad_annotations(annotations, message):
    with pytest.raises(ValueError, match=message):
        pairs_per_annotator([VOTES | {"annotations": annotations}])


def test_bad_responses():
    with pytest.raises(ValueError, match="row 0, column 'completions': must hold two responses"):
        pairs_per_annotator([VOTES | {"completions": ["A", "B", "C"]}])


def test_annotators_are_numbered_in_order_of_their_names(check):
    rows = [{"annotator": "zoe"}, {"annotator": None}, {"annotator": "ann"}, {"annotator": "zoe"}]
    ids = [2, 1, 0, 2]
    expected = [row | {"annotator_id": k} for row, k in zip(rows, ids, strict=True)]
    check(lambda table: number_annotators(table).table, rows, expected)
    assert number_annotators(rows).names == ["ann", "unknown", "zoe"]
    with pytest.raises(ValueError, match=r"row 0, column 'annotator': must be a name \(str\)"):
        number_annotators([{"annotator": 3}])


def test_reliability(check):
    rows = [{"annotator": "zoe"}, {"annotator": None}, {"annotator": "ann"}]
    expected = [rows[0] | {"eta": 0.6}, rows[1] | {"eta": 0.8}, rows[2] | {"eta": 0.9}]
    check(with_reliability, rows, expected, {"zoe": 0.6, "unknown": 0.8})
    with pytest.raises(ValueError, match="row 2, column 'annotator': 'ann' has no reliability"):
        with_reliability(rows, {"zoe": 0.6, "unknown": 0.8}, default=None)
    for eta in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\)"):
            with_reliability(rows, {"zoe": eta})


def test_reliability_feeds_the_loss():
    torch = pytest.importorskip("torch")
    from prefkern import LOSSES, SeqStats

    table = with_reliability([{"annotator": "zoe"}, {"annotator": "ann"}], {"zoe": 0.6})
    eta = torch.tensor([row["eta"] for row in table], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    seq = SeqStats(logp=zero, ref_logp=zero, length=zero + 1)
    # At margin 0 every label costs log 2, whatever the annotator.
    loss = LOSSES["lcpo"](seq, seq, eta=eta)
    torch.testing.assert_close(loss, torch.full_like(zero, 2.0).log())


# ---- weights ------------------------------------------------------------------------------------


def test_pair_weights(check):
    rows = [{"gap": 1.0}, {"gap": 3.0}]
    expected = [{"gap": 1.0, "weight": 0.5}, {"gap": 3.0, "weight": 1.5}]
    check(pair_weights, rows, expected, lambda row: row["gap"], mean_one=True)
    check(pair_weights, rows, expected, [0.5, 1.5])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one number per row, 2, got 1"),
        ([1.0, -1.0], "row 1, column 'weight': must be at least 0, got -1"),
        ([1.0, float("nan")], "row 1, column 'weight': must be finite"),
        ([1.0, None], "row 1, column 'weight': must be a number"),
    ],
)
def test_bad_pair_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        pair_weights([{"a": 1}, {"a": 2}], weights)


def test_pair_weights_that_cannot_be_normalised_or_replaced():
    with pytest.raises(ValueError, match="all weights are 0"):
        pair_weights([{"a": 1}], [0.0], mean_one=True)
    with pytest.raises(ValueError, match="row 0, column 'weight': is there already"):
        pair_weights([{"weight": 1.0}], [1.0])


def test_token_weights(check):
    rows = [{"chosen_ids": [3, 4, 4], "rejected_ids": [4]}]
    weights = {"chosen_weights": [1.0, 0.5, 0.5], "rejected_weights": [0.5]}
    check(
        token_weights, rows, [rows[0] | weights], lambda ids: [0.5 if t == 4 else 1.0 for t in ids]
    )


@pytest.mark.parametrize(
    ("weigh", "message"),
    [
        (lambda ids: [1.0], "'chosen_weights': must hold 2 numbers, one per token, got 1"),
        (lambda ids: [1.0] * 3, "'chosen_weights': must hold 2 numbers, one per token, got 3"),
        (lambda ids: [-1.0] * len(ids), r"'chosen_weights\[0\]': must be at least 0"),
        (lambda ids: [float("inf")] * len(ids), r"'chosen_weights\[0\]': must be finite"),
    ],
)
def test_bad_token_weights(weigh, message):
    with pytest.raises(ValueError, match="row 0, column " + message):
        token_weights([{"chosen_ids": [1, 2], "rejected_ids": [1]}], weigh)
