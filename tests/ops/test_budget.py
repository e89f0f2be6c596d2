"""Rows of logits kept for a backward: within the budget, whole, and padded on a GPU alone."""

from __future__ import annotations

import pytest
import torch

from prefkern.backends.tiled.tiling import Kept, Step, Tiling
from prefkern.ops import budget

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("v", [50_257, 32_001, 152_064, 7])
@pytest.mark.parametrize("bytes_per_logit", [2, 8])
def test_bytes_stay_within_the_budget(v, bytes_per_logit):
    for given in (0, v * bytes_per_logit - 1, 10 * v * bytes_per_logit + 5, 1 << 30):
        for device in (CPU, GPU):
            kept = budget.rows_kept(1000, v, bytes_per_logit, given, device)
            # rounding up to a whole row of V is all that a GPU's cache may add
            over = 0 if device == CPU else v * bytes_per_logit
            assert 0 <= kept * v * bytes_per_logit <= given + over
    assert budget.rows_kept(1000, v, bytes_per_logit, 1 << 40, CPU) == 1000


@pytest.mark.parametrize("v", [50_257, 32_001, 152_064])
def test_a_budget_for_everything_keeps_the_one_tile_of_a_ragged_vocabulary(v):
    """Rows of a tile are padded; a cache of rows x V logits alone would never hold it."""
    rows = 40
    kept = budget.rows_kept(rows, v, 2, 1 << 30, GPU)
    plan = Tiling(rows, v, rows, v)
    cache = torch.empty(kept * v, dtype=torch.bfloat16)
    assert Kept(plan, 1, cache).place(Step(0, rows, 0, v)) is not None


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        assert budget.rows_kept(10, 100, 4, None, CPU) == 0
