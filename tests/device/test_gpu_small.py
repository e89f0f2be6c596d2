"""Every op once against float64 on the same device: plain and frozen heads, given logits, every
list family, segment and error sums, in every dtype served; a second run gives the same bits."""

from __future__ import annotations

import pytest
import torch

from benchmarks import inside, small

CHECKS = {check.name: check for check in small.checks("cpu", gpu=torch.cuda.is_available())}


@pytest.mark.parametrize("name", CHECKS)
def test_check(gpu, device, name):
    checks = small.checks(device, gpu=device == "cuda")
    check = next(check for check in checks if check.name == name)
    if off := inside.reasons(gpu, check.op, device, check.dtype):
        pytest.skip("; ".join(off))
    row = check.row(gpu, device)
    assert row["status"] == "ok", row
    first, second = (check.results(gpu, device, check.dtype) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b), "a second run gave other bits"
