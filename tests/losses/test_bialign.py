"""BiAlign's ranking term and KL against plain loops."""

from __future__ import annotations

import pytest
import torch

from prefkern import losses, preference_loss

NAN = float("nan")


def by_loops(scores: list[torch.Tensor], teacher: list[float]) -> torch.Tensor:
    """sum over pairs of max(0, (q- - q+) / range + (rank- - rank+) / (N - 1))."""
    order = sorted(range(len(teacher)), key=lambda i: -teacher[i])
    rank = {i: place for place, i in enumerate(order, 1)}
    width = max(scores, key=float) - min(scores, key=float)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(teacher)):
        for j in range(len(teacher)):
            if teacher[i] > teacher[j]:
                gap = (rank[j] - rank[i]) / (len(teacher) - 1)
                total = total + torch.relu((scores[j] - scores[i]) / width + gap)
    return total


def test_ranking_and_kl_of_two_lists():
    g = torch.Generator().manual_seed(0)
    scores = (-9 * torch.rand(9, generator=g, dtype=torch.float64)).requires_grad_()
    teacher = [NAN, -3.0, -1.0, -2.5, -7.0, NAN, -1.0, -4.0, -2.0]
    fkl, length = torch.rand(9, generator=g).double(), torch.arange(2.0, 11.0).double()
    cu = torch.tensor([0, 5, 9], dtype=torch.int32)
    found = losses.bialign(
        scores, torch.tensor(teacher).double(), cu, fkl=fkl, length=length, lam=0.5
    )
    s = list(scores)
    ranking = [by_loops(s[1:5], teacher[1:5]), by_loops(s[6:], teacher[6:])]
    kl = (fkl[0] + fkl[5]) / (length[0] + length[5])  # per token of all first sequences
    assert found.mean().item() == pytest.approx((kl + 0.5 * sum(ranking) / 2).item(), rel=1e-10)
    grads = [torch.autograd.grad(x, scores)[0] for x in (found.sum(), 0.5 * sum(ranking))]
    assert torch.allclose(*grads, atol=1e-12) and grads[0].abs().sum() > 0
    assert grads[0][0] == 0 == grads[0][5]  # not ranked


def test_two_subsets_learn_with_a_constant_range_only():
    cu, nothing = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(2).double()
    scores = torch.tensor([-2.0, -1.0], dtype=torch.float64, requires_grad=True)
    for constant, slope in ((False, [0.0, 0.0]), (True, [-1.0, 1.0])):
        loss = losses.bialign(
            scores, torch.tensor([1.0, 0.0]).double(), cu, fkl=nothing, length=nothing + 1.0,
            constant_range=constant,
        )  # fmt: skip
        assert loss.item() == pytest.approx(2.0)  # (q- - q+) / range = 1, and one rank apart
        assert torch.autograd.grad(loss.sum(), scores)[0].tolist() == pytest.approx(slope)


def test_equal_scores_and_arguments():
    cu, one = torch.tensor([0, 3], dtype=torch.int32), torch.ones(3).double()
    scores = torch.full((3,), -2.0, dtype=torch.float64, requires_grad=True)
    loss = losses.bialign(
        scores, torch.tensor([2.0, 1.0, 0.0]).double(), cu, fkl=0 * one, length=one
    )
    assert loss.item() == pytest.approx(0.5 + 0.5 + 1.0)
    assert torch.isfinite(torch.autograd.grad(loss.sum(), scores)[0]).all()
    with pytest.raises(ValueError, match="lam must be"):
        losses.bialign(scores, one, cu, fkl=one, length=one, lam=-1.0)


def test_the_kl_is_over_the_demonstrations_where_their_labels_are_given():
    g = torch.Generator().manual_seed(1)
    hidden, ref = (torch.randn(3, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(9, 4, generator=g, dtype=torch.float64)
    wide = torch.randint(0, 9, (3, 5), generator=g)
    targets = wide.clone()
    targets[:, :3] = -100
    wide[1:, :3] = -100  # those of the first sequence alone
    labels = torch.tensor([NAN, 1.0, 0.0])
    call = dict(
        loss="bialign", lam=0.0, ref_hidden=ref, relevance=labels,
        cu_groups=torch.tensor([0, 3], dtype=torch.int32),
    )  # fmt: skip
    p, r = (torch.log_softmax(x @ weight.T, -1) for x in (hidden, ref))
    kl = (r.exp() * (r - p)).sum(-1)[0]
    answer, _ = preference_loss(hidden, weight, targets, **call)
    whole, _ = preference_loss(hidden, weight, targets, likelihood_targets=wide, **call)
    assert answer.item() == pytest.approx(kl[3:].mean().item(), rel=1e-10)
    assert whole.item() == pytest.approx(kl.mean().item(), rel=1e-10)
