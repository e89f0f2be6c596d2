"""error_sum's Triton kernels: frames shared by several programs, mixed types, repeated bits.

tests/ops/test_error_sum.py runs the op on this backend too.
"""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP32, FP64, backends_on
from closeness import assert_same_bits
from prefkern.kernels import error_sum as kernel

from prefkern.backends.eager import error_sum as eager

pytestmark = pytest.mark.skipif("triton" not in backends_on(), reason="the triton backend is off")

STATS = "err,ref_err,dot,huber:0.01"


@pytest.mark.parametrize("segments", [None, [0, 2, -1]], ids=["whole", "segments"])
@pytest.mark.parametrize("of_target", [BF16, FP32, FP64], ids=str)
def test_parts_of_large_frames(of_target, segments, monkeypatch):
    """2 x 600 elements of a frame, 3 programs for each."""
    monkeypatch.setattr(kernel, "PART", 400)
    assert kernel._parts(1200) == 3
    p, t, q = (torch.randn(2, 2, 3, 600).to(d) for d in (BF16, of_target, FP32))
    where = None if segments is None else torch.tensor(segments, dtype=torch.int32)
    count = 1 if segments is None else 3
    if where is not None:
        p[:, :, 2] = torch.nan  # a frame that is left out may hold anything
    args = (p, t, q, where, count, STATS)
    got, want = kernel.error_sum_fwd(*args), eager.error_sum_fwd(*args)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)
    assert_same_bits(got, kernel.error_sum_fwd(*args))
    d_out = torch.randn(4, 2, count, dtype=FP64)
    slope = kernel.error_sum_bwd(d_out, p, t, q, where, STATS)
    want = eager.error_sum_bwd(d_out, p, t, q, where, STATS)
    assert slope.dtype == BF16
    torch.testing.assert_close(slope, want, rtol=2**-7, atol=1e-30)
