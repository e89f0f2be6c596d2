"""Bradley-Terry on plain scores: worked values, the pairwise form, a reward head that learns."""

from __future__ import annotations

import math

import pytest
import torch

from prefkern import losses


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def groups(*sizes: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)


def test_worked_values():
    scores = torch.tensor([0.5, -1.0, 2.0, 0.3, 0.3], dtype=torch.float64, requires_grad=True)
    relevance = torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    loss = losses.bradley_terry(scores, relevance, groups(3, 2))
    # 3 comparisons: 0 over 1, 0 over 2, 1 over 2; the second prompt has none
    want = (softplus(-1.5) + softplus(1.5) + softplus(3.0)) / 3
    assert loss.tolist() == pytest.approx([want, 0.0], rel=1e-14)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert grad[:3].sum().item() == pytest.approx(0.0, abs=1e-15) and not grad[3:].any()
    total = losses.bradley_terry(scores, relevance, groups(3, 2), pair_reduction="sum")
    assert total[0].item() == pytest.approx(3 * want, rel=1e-14)


def test_two_answers_are_the_logistic_loss():
    chosen = torch.tensor([1.0, 0.0, -3.0, 900.0], dtype=torch.float64)
    rejected = torch.tensor([0.2, 0.0, 5.0, -900.0], dtype=torch.float64)
    scores = torch.stack([chosen, rejected], 1).flatten()
    relevance = torch.tensor([1.0, 0.0]).repeat(4)
    loss = losses.bradley_terry(scores, relevance, torch.arange(0, 9, 2, dtype=torch.int32))
    want = -torch.nn.functional.logsigmoid(chosen - rejected)
    torch.testing.assert_close(loss, want, rtol=1e-14, atol=0)


def test_centering_pulls_what_is_there():
    scores = torch.tensor([1.0, 3.0, 7.0, 2.0], dtype=torch.float64, requires_grad=True)
    relevance = torch.tensor([1.0, 0.0, float("nan"), 1.0], dtype=torch.float64)
    plain = losses.bradley_terry(scores, relevance, groups(3, 1))
    centered = losses.bradley_terry(scores, relevance, groups(3, 1), center=0.1)
    assert (centered - plain).tolist() == pytest.approx([0.1 * (1 + 9) / 2, 0.1 * 4])
    (grad,) = torch.autograd.grad((centered - plain).sum(), scores)
    assert grad.tolist() == pytest.approx([0.1, 0.3, 0.0, 0.4])


def test_gradcheck_with_ties_and_masks():
    scores = torch.tensor([0.0, 0.0, 0.0, 0.4, -0.2, 0.0], dtype=torch.float64, requires_grad=True)
    relevance = torch.tensor([2.0, 2.0, 1.0, 0.0, float("nan"), 0.0], dtype=torch.float64)
    cu = groups(4, 2)
    assert torch.autograd.gradcheck(
        lambda s: losses.bradley_terry(s, relevance, cu, center=0.3), scores
    )


@pytest.mark.parametrize("bad", [{"center": -1.0}, {"pair_reduction": "max"}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        losses.bradley_terry(torch.zeros(2), torch.tensor([1.0, 0.0]), groups(2), **bad)


def test_a_reward_head_learns_to_rank():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(40, 4, 8, generator=g)
    truth = torch.randn(8, generator=g)
    relevance = (features @ truth).flatten()
    cu = torch.arange(0, 161, 4, dtype=torch.int32)
    weight = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    seen = []
    for _ in range(60):
        loss = losses.bradley_terry((features @ weight).flatten(), relevance, cu).mean()
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[0] == pytest.approx(math.log(2.0), rel=1e-6) and seen[-1] < 0.15
    scores = (features @ weight.detach())[:, :, None]
    right = (scores > scores.transpose(1, 2)) == (
        (features @ truth)[:, :, None] > (features @ truth)[:, None, :]
    )
    assert right.float().mean() > 0.97
