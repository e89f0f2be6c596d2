"""Labels that a list loss was not made for: refused, or only their order is taken, and said.

With negative gains the ideal DCG is negative, and the loss would prefer the worst answer.
"""

from __future__ import annotations

import math

import pytest
import torch
from tiny_tokenizer import byte_tokenizer

import prefkern
from prefkern.train.config import TrainConfig
from prefkern.train.data import load_examples
from prefkern.train.demands import label_range

CU = torch.tensor([0, 3])
NEGATIVE = torch.tensor([-3.0, -2.0, 1.0])


@pytest.mark.parametrize(
    ("loss", "hyper"),
    [
        ("approx_ndcg", {}), ("neural_ndcg", {}), ("lipo", {"normalize": True}),
        ("lipo", {"normalize": True, "gain": "linear"}), ("list_mle", {"item_gain": "exp2"}),
        ("softmax", {}),
    ],
)  # fmt: skip
def test_negative_gains_are_refused(loss, hyper):
    with pytest.raises(ValueError, match=r"relevance must be >= 0.*-3\.0"):
        prefkern.LOSSES[loss].fn(torch.zeros(3), NEGATIVE, CU, **hyper)
    scores = torch.zeros(3, requires_grad=True)
    prefkern.LOSSES[loss].fn(scores, NEGATIVE + 3, CU, **hyper).sum().backward()
    assert scores.grad is not None and scores.grad[2] < 0 < scores.grad[0]  # the best one rises


def test_where_labels_are_not_read_a_negative_gain_gives_no_number():
    """As under compilation and on a GPU."""
    scores = torch.zeros(6, requires_grad=True)
    relevance = torch.cat([NEGATIVE, NEGATIVE + 3])
    loss = torch.compile(prefkern.LOSSES["approx_ndcg"].fn, backend="eager")(
        scores, relevance, torch.tensor([0, 3, 6])
    )
    assert loss[0].isnan() and loss[1].isfinite()


@pytest.mark.parametrize(
    ("loss", "arguments", "expected"),
    [
        ("lipo", {}, (0.0, 30.0)), ("approx_ndcg", {}, (0.0, 30.0)),
        ("neural_ndcg", {}, (0.0, 30.0)), ("lipo", {"variant": "hinge"}, None),
        ("lipo", {"gain": "linear"}, None), ("softmax", {}, (0.0, math.inf)),
        ("softmax", {"target": "softmax"}, None), ("point_sigmoid", {}, (0.0, 1.0)),
        ("list_mle", {"item_gain": "exp2"}, (0.0, 30.0)), ("plackett_luce", {}, None),
        ("pro", {}, None), ("dpo", {}, None),
    ],
)  # fmt: skip
def test_the_range_of_a_run(loss, arguments, expected):
    config = TrainConfig(model="m", dataset="d", loss=(loss,), loss_args=arguments)
    assert label_range(config) == expected


def labels(scores, **options) -> tuple[tuple[float, ...], list[str]]:
    row = {"prompt": "q", "responses": [f"r{i}" for i in range(len(scores))], "scores": scores}
    found = load_examples(
        [row], tokenizer=byte_tokenizer(), shuffle_lists=False,
        **{"list_labels": "auto", "label_range": (0.0, 30.0)} | options,
    )  # fmt: skip
    return found.examples[0].relevance, found.report.notes


def test_an_answer_without_a_score_stays_without_a_rank():
    found, notes = labels([100.0, None, 3.0, 55.0])
    assert found[0] == 2.0 and math.isnan(found[1]) and found[2:] == (0.0, 1.0)
    assert "labels from 3 to 100 are not on the scale from 0 to 30" in notes[0]
    found, notes = labels([-1.0, 2.0, 7.5], label_range=(0.0, math.inf))
    assert found == (0.0, 1.0, 2.0) and "from 0 on that the loss" in notes[0]


@pytest.mark.parametrize("how", ["auto", "scores", "order"])
def test_no_order_of_three_is_a_probability(how):
    with pytest.raises(ValueError, match="not on the scale from 0 to 1 that the loss is made for"):
        labels([1.0, 3.0, 5.0], label_range=(0.0, 1.0), list_labels=how)
    assert labels([0.1, 0.5, 1.0], label_range=(0.0, 1.0))[0] == (0.1, 0.5, 1.0)
