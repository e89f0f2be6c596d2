"""CUDA kernels of error_sum in emulation (tests/emulation.py), against the eager twin in fp64."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP16, FP32, FP64
from closeness import assert_same_bits
from emulation import Errors, needed, program

from prefkern.backends.eager import error_sum as reference

pytestmark = needed


def emulated():
    return program("errors", "error_sum")


ALL = "err,ref_err,dot,huber:0.25"
# [B, O, F, I], segment of each frame, segments: chunks are 2048 elements of a frame
LAYOUTS = {
    "samples": ((3, 1, 1, 5000), None, 1),
    "odd": ((2, 1, 1, 131), None, 1),
    "whole_chunks": ((2, 1, 1, 4096), None, 1),
    "one": ((1, 1, 1, 1), None, 1),
    "frames": ((2, 3, 5, 12), [0, 0, 2, -1, 2], 3),
    "long_frames": ((1, 4, 2, 1500), [1, 0], 2),
    "last_axis": ((2, 12, 4, 1), [1, 0, 1, 0], 2),
    "nothing": ((2, 1, 1, 0), None, 1),
}


def make(layout, dtype, other=None, stats=ALL, **rest) -> Errors:
    shape, segments, count = LAYOUTS[layout]
    pred, target, ref = (torch.randn(shape).to(d or dtype) for d in (dtype, other, other))
    found = None if segments is None else torch.tensor(segments, dtype=torch.int32)
    d_out = torch.randn(len(stats.split(",")), shape[0], count, dtype=FP64)
    ref = ref if "ref_err" in stats or "dot" in stats else None
    return Errors(stats, pred, target, ref, found, count, d_out, **rest)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_and_slopes(layout):
    """Sums to the roundings of double, slopes formed in double and rounded once."""
    cases = [make(layout, dtype) for dtype in (FP32, FP64, BF16, FP16)]
    cases += [make(layout, BF16, FP32), make(layout, FP32, FP16, misaligned=True)]
    cases += [make(layout, FP64, stats=s, misaligned=True) for s in ("err", "huber:1e-3", "dot")]
    cases += [c._replace(reverse=True) for c in cases]
    results = emulated().errors(cases)
    for c, (out, d_pred) in zip(cases, results, strict=True):
        want = reference.error_sum_fwd(c.pred, c.target, c.ref, c.segments, c.num_segments, c.stats)
        torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-13 * c.pred[:1].numel())
        slope = reference.error_sum_bwd(c.d_out, c.pred, c.target, c.ref, c.segments, c.stats)
        unit = torch.finfo(d_pred.dtype).eps
        small = 1e-13 if d_pred.dtype == FP64 else 1e-7
        torch.testing.assert_close(d_pred, slope, rtol=unit, atol=small)
    half = len(cases) // 2
    for forward, back in zip(results[:half], results[half:], strict=True):
        assert_same_bits(back[0], forward[0])
        assert_same_bits(back[1], forward[1])


def test_what_is_left_out_may_hold_anything():
    """Frames without a segment, and elements whose slope is 0, are never read."""
    case = make("frames", FP32)
    for x in (case.pred, case.target, case.ref):
        x[:, :, 3] = torch.nan
    out, d_pred = emulated().errors([case])[0]
    assert out.isfinite().all() and bool((d_pred[:, :, 3] == 0).all())
    assert bool((out[:, :, 1] == 0).all())  # a segment without frames
    case.pred.fill_(torch.nan)
    ((_, d_pred),) = emulated().errors([case._replace(d_out=torch.zeros_like(case.d_out))])
    assert bool((d_pred == 0).all())


def test_elements_past_two_to_the_31():
    assert emulated().run(b"far\n") == b"ok"
