"""Metrics against hand-computed values, golden ranking vectors and TRL's definitions."""

import json
import math
from pathlib import Path

import pytest
import torch

from prefkern.objective import metrics
from prefkern.stats import SeqStats

GOLDEN = json.loads((Path(__file__).parent / "golden" / "list.json").read_text())


def seq(**fields):
    return SeqStats(**{k: torch.tensor(v, dtype=torch.float64) for k, v in fields.items()})


def test_ndcg_of_negative_labels_counts_from_the_lowest():
    scores = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.2, 0.3], dtype=torch.float64)
    labels = torch.tensor([2.0, 1.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    best, worst = metrics.rank_stats(scores, labels, cu).ndcg.tolist()
    assert best == 1.0 and worst == pytest.approx(
        (1 / math.log2(3) + 3 / 2) / (3 + 1 / math.log2(3))
    )
    for shift in (1.0, 2.0, 7.5):
        found = metrics.rank_stats(scores, labels - shift, cu).ndcg.tolist()
        assert found == pytest.approx([best, worst if shift >= 2.0 else found[1]])
        assert 0.0 <= found[1] < 1.0


@pytest.mark.parametrize("case", GOLDEN["metrics"], ids=lambda c: c["dataset"])
def test_rank_stats_golden(case):
    data = GOLDEN["datasets"][case["dataset"]]
    scores = case["beta"] * (
        torch.tensor(data["logp"]).double() - torch.tensor(data["ref_logp"]).double()
    )
    labels = torch.tensor(
        [math.nan if y is None else y for y in data["labels"]], dtype=torch.float64
    )
    cu = torch.tensor(data["offsets"], dtype=torch.int32)
    whole, at3 = (
        metrics.rank_stats(scores, labels, cu),
        metrics.rank_stats(scores, labels, cu, at=3),
    )
    for g, want in enumerate(case["per_group"]):
        assert whole.ndcg[g].item() == pytest.approx(want["ndcg"], rel=1e-6)
        assert at3.ndcg[g].item() == pytest.approx(want["ndcg_at_3"], rel=1e-6)
        for name, got in (
            ("pair_accuracy", whole.pair_accuracy), ("best_beats_all", whole.best_first),
            ("margin_best_minus_mean_rest", whole.margin),
        ):  # fmt: skip
            if want[name] is None:
                assert math.isnan(got[g].item())
            else:
                assert got[g].item() == pytest.approx(float(want[name]), rel=1e-5)


def test_masked_items_do_not_count():
    scores = torch.tensor([3.0, 9.0, 1.0, 2.0])
    labels = torch.tensor([1.0, math.nan, 0.0, 2.0])
    got = metrics.rank_stats(scores, labels, torch.tensor([0, 4], dtype=torch.int32))
    alone = metrics.rank_stats(
        scores[[0, 2, 3]], labels[[0, 2, 3]], torch.tensor([0, 3], dtype=torch.int32)
    )
    for a, b in zip(got, alone, strict=True):
        torch.testing.assert_close(a, b)


def test_pair_metrics_by_hand():
    chosen = seq(logp=[-4.0, -6.0], ref_logp=[-5.0, -6.0], length=[2.0, 4.0], fkl=[0.5, 0.1],
                 zmean=[2.0, 4.0], top1=[1.0, 2.0], ent=[3.0, 3.0])  # fmt: skip
    rejected = seq(logp=[-4.0, -7.0], ref_logp=[-4.0, -9.0], length=[1.0, 1.0], fkl=[0.2, 0.2],
                   zmean=[5.0, 1.0], top1=[1.0, 1.0], ent=[2.0, 4.0])  # fmt: skip
    got = metrics.pair_metrics(chosen, rejected, lambda s: 0.1 * s.logratio)
    want = {
        "logps/chosen": -5.0, "logps/rejected": -5.5,
        "rewards/chosen": 0.05, "rewards/rejected": 0.1, "rewards/margins": -0.05,
        "rewards/accuracies": 0.5,
        "kl/chosen": 0.3, "kl/rejected": 0.2, "kl/margin": 0.1,
        "logits/chosen": 1.0, "logits/rejected": 3.0, "mean_token_accuracy": 0.5, "entropy": 1.5,
    }  # fmt: skip
    assert {k: pytest.approx(v.item()) for k, v in got.items()} == want
    assert all(v.dim() == 0 and not v.requires_grad for v in got.values())


def test_equal_rewards_are_not_accurate():
    same = seq(logp=[-4.0], ref_logp=[-4.0], length=[2.0])
    got = metrics.pair_metrics(same, same, lambda s: s.logratio)
    assert got["rewards/accuracies"] == 0 and got["rewards/margins"] == 0


def test_unpaired_metrics_one_side_missing():
    rows = seq(logp=[-4.0, -6.0], ref_logp=[-5.0, -6.0], length=[2.0, 0.0])
    got = metrics.unpaired_metrics(rows, torch.tensor([True, True]), lambda s: s.logratio)
    assert got["rewards/chosen"].item() == pytest.approx(0.5)
    assert got["rewards/rejected"] == 0 and got["rewards/margins"] == 0
    both = metrics.unpaired_metrics(rows, torch.tensor([True, False]), lambda s: s.logratio)
    assert both["rewards/margins"].item() == pytest.approx(1.0)


def test_unpaired_metrics_by_hand():
    rows = seq(logp=[-4.0, -6.0, -2.0], ref_logp=[-5.0, -6.0, -4.0], length=[2.0, 4.0, 1.0],
               fkl=[0.5, 0.1, 0.3], zmean=[2.0, 8.0, 3.0], top1=[1.0, 2.0, 1.0],
               ent=[3.0, 3.0, 1.0])  # fmt: skip
    got = metrics.unpaired_metrics(
        rows, torch.tensor([True, False, True]), lambda s: 0.1 * s.logratio
    )
    want = {
        "logps/chosen": -3.0, "logps/rejected": -6.0,
        "rewards/chosen": 0.15, "rewards/rejected": 0.0, "rewards/margins": 0.15,
        "kl/chosen": 0.4, "kl/rejected": 0.1,
        "logits/chosen": 5 / 3, "logits/rejected": 2.0,
        "mean_token_accuracy": 2 / 3, "entropy": 1.0,
    }  # fmt: skip
    assert {k: pytest.approx(v.item()) for k, v in got.items()} == want


def test_sequence_metrics_by_hand():
    rows = seq(logp=[-4.0, -6.0], ref_logp=[-5.0, -9.0], length=[2.0, 4.0], fkl=[0.5, 0.1],
               zmean=[2.0, 4.0], top1=[1.0, 2.0], ent=[3.0, 6.0])  # fmt: skip
    got = metrics.sequence_metrics(rows, lambda s: 0.1 * s.logratio)
    want = {
        "logps/mean": -5.0, "rewards/mean": 0.2, "kl/mean": 0.3,
        "logits/mean": 1.0, "mean_token_accuracy": 0.5, "entropy": 1.5,
    }  # fmt: skip
    assert {k: pytest.approx(v.item()) for k, v in got.items()} == want
    assert metrics.sequence_metrics(rows, None).keys() == want.keys() - {"rewards/mean"}


def test_list_metrics_by_hand():
    """A list of three, one of a single answer that has nothing to compare, one with an answer left
    out and a tie of scores. Scores and rewards are different numbers."""
    relevance = torch.tensor([0.0, 2.0, 1.0, 5.0, 1.0, math.nan, 0.0], dtype=torch.float64)
    scores = torch.tensor([0.1, 0.3, 0.2, 0.4, 0.5, 0.9, 0.5], dtype=torch.float64)
    cu = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    rows = seq(logp=[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0],
               ref_logp=[-1.0, -3.0, -5.0, -7.0, -9.0, -5.0, -7.0], length=[2.0] * 7,
               zmean=[2.0] * 7, top1=[1.0] * 7, ent=[3.0] * 7)  # fmt: skip
    got = metrics.list_metrics(rows, scores, relevance, cu, lambda s: s.logratio)
    want = {
        "rank/ndcg": 1.0,  # the tie is broken by place
        "rank/best_first": 0.5,  # a tie with the best is no win
        "rank/pair_accuracy": 0.75, "rank/kendall_tau": 0.5,  # a tie counts one half
        "logps/mean": -4.0,
        "rewards/chosen": (1.0 + 3.0 + 4.0) / 3, "rewards/rejected": (0.0 + 2.0 + 0.0) / 3,
        "rewards/margins": ((1.0 - 1.0) + (4.0 - 0.0)) / 2,
        "logits/mean": 1.0, "mean_token_accuracy": 0.5, "entropy": 1.5,
    }  # fmt: skip
    assert {k: pytest.approx(v.item()) for k, v in got.items()} == want
