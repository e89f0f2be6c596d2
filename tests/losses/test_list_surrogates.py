"""Ranking families that only the reference serves, and the likelihood terms of list losses."""

from __future__ import annotations

import math

import pytest
import torch

from prefkern import losses
from prefkern.ops.list_rank import list_rank


def cu(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


EAGER = (
    ("rank_hinge", {}),
    ("rank_hinge", {"mode": "product", "per_item": True, "scale": 0.5}),
    ("anchor", {}),
    ("anchor", {"inner": "mean"}),
    ("set_contrast", {"deviation": 0.5}),
    ("approx_ndcg", {"temperature": 0.5}),
    ("neural_ndcg", {"temperature": 0.7, "sinkhorn_iters": 5}),
)
IDS = ["-".join([f, *map(str, o.values())]) for f, o in EAGER]


def ragged(sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = torch.randn(n, generator=g, dtype=torch.float64)
    relevance = torch.randint(0, 4, (n,), generator=g).double() / 2
    bounds = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
    return scores.requires_grad_(), relevance, bounds


@pytest.mark.parametrize(("family", "options"), EAGER, ids=IDS)
def test_slopes_by_finite_differences(family, options):
    scores, relevance, bounds = ragged([3, 0, 1, 6, 4])
    relevance[5] = float("nan")

    def total(s):
        return list_rank(s, relevance, bounds, family=family, **options)

    (grad,) = torch.autograd.grad(total(scores).sum(), scores)
    for i in range(scores.numel()):
        step = torch.zeros_like(scores)
        step[i] = 1e-6
        with torch.no_grad():
            change = (total(scores + step) - total(scores - step)).sum() / 2e-6
        if family == "anchor":
            continue  # its anchors' weights are constant by definition; proven by the vectors
        assert grad[i].item() == pytest.approx(change.item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("family", "options"), EAGER, ids=IDS)
def test_degenerate_lists(family, options):
    nan = float("nan")
    relevance = torch.tensor([nan, 0.5, nan, 1.0, 1.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    scores = torch.tensor([nan, 0.3, nan, 0.2, -0.4, 1.0, 2.0, 3.0]).double().requires_grad_()
    loss = list_rank(scores, relevance, cu(0, 0, 1, 3, 5, 8), family=family, **options)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize(("family", "options"), EAGER, ids=IDS)
def test_lists_do_not_see_each_other(family, options):
    sizes = [5, 2, 31, 1, 9]
    scores, relevance, bounds = ragged(sizes)
    loss = list_rank(scores, relevance, bounds, family=family, **options)
    for g, size in enumerate(sizes):
        rows = slice(int(bounds[g]), int(bounds[g + 1]))
        alone = list_rank(scores[rows], relevance[rows], cu(0, size), family=family, **options)
        torch.testing.assert_close(alone[0], loss[g], rtol=1e-13, atol=1e-14)
    with torch.no_grad():
        scores[0] = torch.inf
    broken = list_rank(scores, relevance, bounds, family=family, **options)
    assert broken.isnan().tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(("family", "options"), EAGER, ids=IDS)
def test_first_step_at_tied_scores(family, options):
    """Every score 0: finite values, and slopes that push better answers up, if any."""
    relevance = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = list_rank(scores, relevance, cu(0, 3), family=family, **options)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert torch.isfinite(loss).all() and grad[0] <= 0 and grad[1] >= 0


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("rank_hinge", {"mode": "both"}, "mode must be one of"),
        ("anchor", {"inner": "max"}, "inner must be one of"),
        ("approx_ndcg", {"temperature": 0.0}, "temperature must be > 0"),
        ("neural_ndcg", {"sinkhorn_iters": 0}, "sinkhorn_iters must be an int >= 1"),
        ("set_contrast", {"alpha": 1.0}, "takes the options"),
    ],
)
def test_bad_list_options(family, options, message):
    scores, relevance, bounds = ragged([3])
    with pytest.raises(ValueError, match=message):
        list_rank(scores, relevance, bounds, family=family, **options)


def test_likelihood_terms_of_lists():
    scores = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    relevance = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    logp = torch.tensor([-10.0, -20.0, -30.0], dtype=torch.float64)
    got = losses.rrhf(scores, relevance, cu(0, 3), logp=logp, rrhf_weight=2.0, sft_weight=0.5)
    assert got.item() == pytest.approx(2.0 * (1.0 + 2.0) + 0.5 * 20.0)
    plain = losses.knowpat(scores, relevance, cu(0, 3), sft_weight=0.0)
    with_best = losses.knowpat(scores, relevance, cu(0, 3))
    assert (with_best - plain).item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="likelihood term needs logp"):
        losses.rrhf(scores, relevance, cu(0, 3))
    empty = torch.tensor([5.0, 0.0, 5.0])
    got = losses.rrhf(scores, relevance, cu(0, 3), logp=logp, length=empty)
    assert got.item() == pytest.approx(2.0 + 30.0)


def test_bialign_takes_its_kl_from_the_first_sequence():
    scores = torch.tensor([-1.0, -2.0, -1.5], dtype=torch.float64)
    relevance = torch.tensor([float("nan"), 0.2, 0.9], dtype=torch.float64)
    fkl = torch.tensor([3.0, 70.0, 70.0], dtype=torch.float64)
    length = torch.tensor([6.0, 1.0, 1.0], dtype=torch.float64)
    got = losses.bialign(scores, relevance, cu(0, 3, 3), fkl=fkl, length=length)
    # the better subset leads by 0.5, exactly the rank gap 1 of 2
    assert got.sum().item() == pytest.approx(2 * 0.5)
    with pytest.raises(ValueError, match="lam must be"):
        losses.bialign(scores, relevance, cu(0, 3), fkl=fkl, length=length, lam=-1.0)


def test_soft_pairs_refuses_and_drops():
    scores, relevance = torch.zeros(3), torch.tensor([1.0, float("nan"), 0.0])
    where = torch.tensor([[0, 1], [0, 2]])
    got = losses.soft_pairs(scores, relevance, cu(0, 3), pairs=where, pref_prob=torch.ones(2))
    assert got.item() == pytest.approx(math.log(2.0))
    with pytest.raises(ValueError, match=r"pairs must be integers \[M, 2\]"):
        losses.soft_pairs(scores, relevance, cu(0, 3), pairs=where[0], pref_prob=torch.ones(2))
