"""ADPO against plain loops over full logits, and against DPO where each answer is one segment."""

from __future__ import annotations

import math

import pytest
import torch

from prefkern import losses, preference_loss
from prefkern.stats import TokenStats

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")

# two pairs; two prompt tokens before each answer, answers of 4, 2, 1 and 3 tokens
LENGTHS = (6, 4, 3, 5)
SEGMENTS = [[0, 0, 1, 1, 2, 3], [0, 0, 1, 2], [0, 0, 1], [0, 0, 1, 1, 2]]


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    hidden, ref = (torch.randn(n, 5, generator=g, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(11, 5, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 11, (n,), generator=g)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    for start in cu[:-1].tolist():
        targets[start : start + 2] = -100
    index = torch.tensor([k for one in SEGMENTS for k in one])
    return hidden.requires_grad_(), weight, targets, cu, ref, index


def call(batch, **args):
    hidden, weight, targets, cu, ref, _ = batch
    groups = torch.tensor([0, 2, 4], dtype=torch.int32)
    return preference_loss(
        hidden, weight, targets, cu, ref_hidden=ref, cu_groups=groups, **args
    )[0]  # fmt: skip


def ratios(batch):
    hidden, weight, targets, cu, ref, _ = batch
    one, two = (torch.log_softmax(x @ weight.T, -1) for x in (hidden, ref))
    at = targets.clamp(min=0)[:, None]
    rho = (one - two).gather(1, at)[:, 0]
    return [rho[a:b] for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]


def test_loss_and_gradient_by_loops(batch):
    hidden, index = batch[0], batch[5]
    rho = ratios(batch)
    terms = []
    for pair in (0, 2):
        for segment in (1, 2, 3):
            sums, there = [], False
            for k in (pair, pair + 1):
                inside = [t for t, number in enumerate(SEGMENTS[k]) if number == segment]
                there |= bool(inside)
                sums.append(sum((rho[k][t] for t in inside), torch.zeros(())))
            if there:
                terms.append(torch.log1p(torch.exp(-0.7 * (sums[0] - sums[1]))))
    want = sum(terms) / 2
    found = call(batch, loss="adpo", step_index=index, beta=0.7)
    assert found.item() == pytest.approx(want.item(), rel=1e-10)
    grads = [torch.autograd.grad(x, hidden)[0] for x in (found, want)]
    assert torch.allclose(*grads, rtol=1e-8, atol=1e-12)


def test_boundaries_say_the_same_and_one_segment_is_dpo(batch):
    cuts = [0, 4, 5, 6, 9, 10, 13, 17, 18]  # a prompt belongs to the first segment
    boundaries = torch.tensor(cuts, dtype=torch.int32)
    given = [call(batch, loss="adpo", cu_segments=boundaries),
             call(batch, loss="adpo", step_index=batch[5])]  # fmt: skip
    assert given[0].item() == pytest.approx(given[1].item(), rel=1e-12)
    whole = call(batch, loss="adpo", cu_segments=batch[3])
    assert whole.item() == pytest.approx(call(batch, loss="dpo").item(), rel=1e-12)


def test_at_the_reference_every_segment_costs_log_2(batch):
    hidden, weight, targets, cu, _, index = batch
    same = (hidden, weight, targets, cu, hidden.detach(), index)
    assert call(same, loss="adpo", step_index=index).item() == pytest.approx(
        math.log(2.0) * (3 + 2) / 2
    )


def test_what_cannot_be_compared_is_refused(batch):
    with pytest.raises(ValueError, match="one of the two"):
        call(batch, loss="adpo")
    tokens = TokenStats(logp=torch.zeros(6), ref_logp=torch.zeros(6))
    cu = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"must hold pairs.*\[3\]"):
        losses.adpo(
            tokens, cu, scored=torch.ones(6, dtype=torch.bool),
            cu_groups=torch.tensor([0, 3], dtype=torch.int32),
            step_index=torch.ones(6, dtype=torch.int64),
        )  # fmt: skip
