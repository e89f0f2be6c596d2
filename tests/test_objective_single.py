"""A loss that reads the chosen answer alone, on single answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prefkern import preference_loss


def test_sft_on_single_answers_is_the_likelihood_of_all_of_them():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 9, (3, 6), generator=g)
    targets[:, :2], targets[1, 4:] = -100, -100
    loss, metrics = preference_loss(hidden, weight, targets, loss="sft", layout="unpaired")
    want = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert loss.item() == pytest.approx(want.item(), rel=1e-10)
    grads = [torch.autograd.grad(x, hidden)[0] for x in (loss, want)]
    assert torch.allclose(*grads, rtol=1e-8)
    assert not any("rejected" in name or "margins" in name for name in metrics)
    # the terms of a step count all its tokens, the rest of them elsewhere
    half, _ = preference_loss(
        hidden, weight, targets, loss="sft", layout="unpaired", num_items={"tokens": 20}
    )
    assert half.item() == pytest.approx(want.item() * 10 / 20, rel=1e-10)


def test_a_loss_of_pairs_does_not_take_single_answers():
    hidden, weight = torch.zeros(3, 2, 4), torch.zeros(9, 4)
    targets = torch.ones(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="layout must be 'pairs'"):
        preference_loss(
            hidden, weight, targets, loss="dpo", layout="unpaired", ref_logp=torch.zeros(3, 2)
        )
