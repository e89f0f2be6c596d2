"""Losses that are each other in a special case, and the token weights behind two of them."""

from __future__ import annotations

import math

import pytest
import torch
from loss_batch import answers, cu

from prefkern import losses
from prefkern.losses import weights


def test_lists_of_two_are_pairs():
    chosen, rejected = answers(1.5, -0.3), answers(0.2, 0.4)
    scores = torch.stack([chosen.logratio, rejected.logratio], 1).flatten()
    relevance = torch.tensor([1.0, 0.0] * 2, dtype=torch.float64)
    want = losses.dpo(chosen, rejected, beta=0.05)
    for name in ("pair_logistic", "sdpo", "list_mle"):
        got = losses.LOSSES[name](scores, relevance, cu(0, 2, 4), beta=0.05)
        torch.testing.assert_close(got, want)
    got = losses.infonca(scores, relevance, cu(0, 2, 4), beta=0.05)
    torch.testing.assert_close(got, want)
    got = losses.nca(scores, relevance, cu(0, 2, 4), beta=0.05)
    torch.testing.assert_close(got, losses.nca_pair(chosen, rejected, beta=0.05))
    both = losses.soft_pairs(
        scores, relevance, cu(0, 2, 4), pairs=torch.tensor([[0, 1], [2, 3]]),
        pref_prob=torch.ones(2), beta=0.05,
    )  # fmt: skip
    torch.testing.assert_close(both, want)


def test_no_source_beats_the_pivot_is_length_normalised_dpo():
    chosen, rejected = answers(1.0, -2.0), answers(0.5, 0.1)
    worse, better = torch.full((2, 3), -9.0), torch.zeros(2, 3)
    got = losses.infifpo(
        chosen, rejected, source_chosen_mean_logps=worse, source_rejected_mean_logps=better
    )
    torch.testing.assert_close(got, losses.ln_dpo(chosen, rejected, beta=2.5))


def test_ipo_md_is_ipo_for_a_sure_preference():
    chosen, rejected = answers(1.0, -2.0), answers(0.5, 0.1)
    got = losses.ipo_md(chosen, rejected, tau=0.2)
    torch.testing.assert_close(got, losses.ipo(chosen, rejected, beta=0.2, norm="sum"))
    mean = losses.ipo_md(chosen, rejected, tau=0.2, reduction="mean")
    torch.testing.assert_close(mean, losses.ipo(chosen, rejected, beta=0.2))


def test_second_reference_at_weight_zero_is_dpo():
    chosen, rejected = answers(1.0, -2.0), answers(0.5, 0.1)
    slow = torch.zeros(2)
    got = losses.dpo_second_reference(
        chosen, rejected, slow_chosen_logps=slow, slow_rejected_logps=slow, alpha=0.0
    )
    assert torch.equal(got, losses.dpo(chosen, rejected))


def test_scir_gates_dpo_by_agreement():
    chosen, rejected = answers(3.0, 3.0, 0.0), answers(0.0, 0.0, 0.0)
    judge = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    only = {"judge_logit_gap": judge, "lam": 0.0, "lambda_entropy": 0.0}
    got = losses.scir(chosen, rejected, **only)
    dpo = losses.dpo(chosen, rejected)
    # a margin of exactly 0 contradicts nobody
    assert torch.equal(got, dpo * torch.tensor([1.0, 0.0, 1.0]))
    assert torch.equal(losses.scir(chosen, rejected, **only, consistent_only=False), dpo)
    agree = losses.scir(
        answers(10.0), answers(0.0), judge_logit_gap=torch.tensor([1.0]), lambda_entropy=0.0
    )
    assert agree.item() == pytest.approx(math.log1p(math.exp(-1.0)))  # equal estimates: no penalty


def test_tisdpo_without_models_is_dpo():
    scored = torch.ones(4, dtype=torch.bool)
    same = -torch.rand(4)
    stage = weights.tisdpo(same, same, torch.ones(4), scored, cu(0, 4))
    assert torch.equal(stage.weights, torch.ones(4))


def test_tisdpo_transforms():
    positive = torch.tensor([0.0, 2.004, -3.0, 0.5, 1.0, 9.0])
    scored = torch.tensor([True, True, True, True, True, False])
    sign = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])

    def found(transform, **options):
        stage = weights.tisdpo(
            positive, torch.zeros(6), sign, scored, cu(0, 3, 6), transform=transform, **options
        )
        return [round(w, 4) for w in stage.weights.tolist()]

    assert found("origin") == [0.0, 2.0, -3.0, -0.5, -1.0, 0.0]
    assert found("threshold") == [0.0, 1.0, -1.0, -0.5, -1.0, 0.0]
    assert found("threshold_and_scale") == [1.0, 1.3, 0.7, 0.9, 0.8, 0.0]
    assert found("rank_based") == [1.0, 1.3, 0.7, 1.3, 0.7, 0.0]
    assert found("binary") == [1.0] * 5 + [0.0]
    assert found("binary", keep=0.5) == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    for options, message in (
        ({"transform": "rank"}, "transform must be one of"),
        ({"L": 2.0}, "L must not exceed U"),
        ({"keep": 0.0}, "keep must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.tisdpo(positive, positive, sign, scored, cu(0, 6), **options)
    with pytest.raises(ValueError, match=r"positive_logp must be \[N\]"):
        weights.tisdpo(positive[:3], positive, sign, scored, cu(0, 6))


def test_tree_weights_are_a_mean_of_step_means():
    scored = torch.tensor([True, True, True, False, True, True])
    step = torch.tensor([1, 1, 2, 2, 0, 0])  # the second sequence has no step at all
    cosine = torch.tensor([1.0, 1.0, -0.5, -0.5, 0.3, 0.3])
    stage = weights.tree_tpo(cu(0, 4, 6), scored, step, cosine)
    torch.testing.assert_close(stage.weights, torch.tensor([0.4, 0.4, 0.2, 0.0, 0.0, 0.0]).double())
    with pytest.raises(ValueError, match="step_index must be"):
        weights.tree_tpo(cu(0, 6), scored, step - 1, cosine)
