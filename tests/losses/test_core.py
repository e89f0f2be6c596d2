"""The pieces that losses are written with."""

from __future__ import annotations

import pytest
import torch

from prefkern.losses import core
from prefkern.losses.record import LOSSES, Register


def test_a_difference_broadcasts_nothing():
    with pytest.raises(ValueError, match="same number of sequences"):
        core.difference(torch.zeros(3), torch.zeros(1))


@pytest.mark.parametrize("take", [core.per_item, core.data])
def test_numbers_of_the_caller_are_constants(take):
    given = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not take("margin", given, torch.zeros(2)).requires_grad
    assert not core.scalar("margin", given.sum(), torch.zeros(2)).requires_grad


def test_a_mean_per_token_counts_the_tokens_that_are_there():
    total, length = torch.tensor([6.0, 0.0]), torch.tensor([3, 0])
    assert core.per_token(total, length).mean() == 2.0
    assert core.per_token(total, torch.tensor([0, 0])).mean() == 6.0


def test_the_register_is_in_the_order_of_names():
    own = Register()
    for name in ("orpo", "dpo"):
        own.add(LOSSES[name])
    assert list(own) == ["dpo", "orpo"]
