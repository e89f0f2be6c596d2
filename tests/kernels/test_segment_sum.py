"""segment_sum's Triton kernels: segments shared by several programs, mixed types, repeated bits.

tests/ops/test_segment_sum.py runs the op on this backend too.
"""

from __future__ import annotations

import pytest
import torch
from cases import FP32, FP64, backends_on
from closeness import assert_same_bits
from prefkern.kernels import segment_sum as kernel

from prefkern.backends.eager import segment_sum as eager

pytestmark = pytest.mark.skipif("triton" not in backends_on(), reason="the triton backend is off")

CU = torch.tensor([0, 0, 150, 151, 151, 400], dtype=torch.int32)


@pytest.mark.parametrize("weights", [None, (400,), (2, 400)], ids=str)
@pytest.mark.parametrize(("of_values", "of_weights"), [(FP32, FP32), (FP64, FP32), (FP32, FP64)])
def test_parts_of_long_segments(of_values, of_weights, weights, monkeypatch):
    """400 tokens in 5 segments, 4 programs for each: blocks, part and token counts all ragged."""
    monkeypatch.setattr(kernel, "LONG", 20)
    assert kernel._splits(400, 5) == 4
    values = torch.randn(2, 400).to(of_values)
    w = None if weights is None else torch.randn(weights).to(of_weights)
    d_out = torch.randn(2, 5, dtype=FP64)
    out = kernel.segment_sum_fwd(values, w, CU)
    torch.testing.assert_close(out, eager.segment_sum_fwd(values, w, CU), rtol=1e-13, atol=1e-13)
    assert_same_bits(out, kernel.segment_sum_fwd(values, w, CU))
    args = (d_out, values, w, CU, True, w is not None)
    for got, want in zip(kernel.segment_sum_bwd(*args), eager.segment_sum_bwd(*args), strict=True):
        unit = torch.finfo(want.dtype).eps
        torch.testing.assert_close(got, want, rtol=unit, atol=unit)


def test_only_very_long_segments_are_shared():
    assert kernel._splits(8192, 1) == 1
    assert kernel._splits(1 << 20, 1 << 10) == 1
    assert kernel._splits(1 << 20, 4) == 8
    assert kernel._splits(1 << 30, 1) == kernel.MOST_SPLITS
    assert kernel._splits(0, 0) == 1


@pytest.mark.parametrize("weights", [None, (400,), (2, 400)], ids=str)
def test_tokens_that_no_segment_holds_have_gradient_0(weights, monkeypatch):
    """The memory of the gradients is NaN before the kernel runs."""
    monkeypatch.setattr(kernel, "LONG", 20)
    values, d_out = torch.randn(2, 400), torch.randn(2, 3, dtype=FP64)
    w = None if weights is None else torch.randn(weights)
    cu = torch.tensor([70, 100, 100, 330], dtype=torch.int32)
    values[:, :70], values[:, 330:] = torch.nan, torch.inf
    for bounds, d in ((cu, d_out), (cu[:1], d_out[:, :0])):
        args = (d, values, w, bounds, True, w is not None)
        for got, want in zip(
            kernel.segment_sum_bwd(*args), eager.segment_sum_bwd(*args), strict=True
        ):
            assert_same_bits(got, want)
            inside = range(int(bounds[0]), int(bounds[-1]))
            outside = [i for i in range(got.shape[-1]) if i not in inside]
            assert (got[..., outside] == 0).all()
    out = kernel.segment_sum_fwd(values, w, cu)
    torch.testing.assert_close(out, eager.segment_sum_fwd(values, w, cu), rtol=1e-13, atol=1e-13)
