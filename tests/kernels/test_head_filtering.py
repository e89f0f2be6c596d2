"""filter_gradient(): what is left out, the stated bound of the error, and that it is off."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP32, Regime, backends_on, upstream_for
from checks import inputs_of, run_op
from closeness import assert_same_bits
from prefkern.kernels import filter_gradient

from prefkern.backends.tiled import filtering, plan

pytestmark = pytest.mark.skipif("triton" not in backends_on(), reason="the triton backend is off")

CASE = Regime("peaked", N=40, V=400, D=16)


def peaked(dtype):
    """Hidden states that lean far to their targets: most columns have next to no probability."""
    return inputs_of("linear_logps", CASE, dtype, lean=4.0)


@pytest.mark.parametrize("several", [False, True], ids=["one_tile", "several_tiles"])
def test_the_error_stays_below_its_bound(several, monkeypatch):
    from prefkern.kernels.epilogue import Kernels

    if several:
        monkeypatch.setattr(Kernels, "chunk_columns", lambda self, call: 128)
        monkeypatch.setattr(plan, "TILE_BYTES", 1024)
        monkeypatch.setattr(plan, "ROW_ALIGN", 16)
    inputs = peaked(BF16)
    # every row gets the same upstream number, so one size s bounds all rows
    upstream = {"logp": torch.full((CASE.N,), 0.5)}
    _, want = run_op("triton", inputs, ("logp",), upstream)
    with filter_gradient() as report:
        _, got = run_op("triton", inputs, ("logp",), upstream)
    assert 0.2 < report.share < 1, report
    half = torch.finfo(BF16).eps / 2
    rows = inputs.targets >= 0
    size = torch.where(rows, 2 * 0.5, 0.0)[:, None]
    bounds = {
        "hidden": half * size * inputs.weight.float().abs().sum(0),
        "weight": half * (size * inputs.hidden.float().abs()).sum(0).expand(CASE.V, -1),
    }
    for name, bound in bounds.items():
        # both results are rounded to bf16 once, half an eps of their own size each
        rounding = half * (want[name].float().abs() + got[name].float().abs())
        error = (got[name].float() - want[name].float()).abs()
        assert bool((error <= bound + rounding).all()), (name, (error - bound).max())
        assert not torch.equal(got[name], want[name])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_off_by_default_and_for_fp32(dtype):
    inputs = peaked(dtype)
    upstream = upstream_for(("logp",), CASE.N, dtype)
    _, want = run_op("triton", inputs, ("logp",), upstream)
    with filter_gradient() as report:
        pass
    assert report.columns == 0
    if dtype is FP32:
        with filter_gradient() as report:
            _, got = run_op("triton", inputs, ("logp",), upstream)
        assert report.columns == 0 and report.share == 0
    else:
        _, got = run_op("triton", inputs, ("logp",), upstream)
    for name in want:
        assert_same_bits(got[name], want[name], name)


def test_columns_that_do_not_count_are_found_by_their_row_sizes():
    dx = torch.tensor([[1.0, 0.001, float("nan"), 0.0], [0.5, 0.0, 0.0, 0.004]]).bfloat16()
    limit = torch.tensor([0.002, 0.003]).bfloat16()
    assert filtering.active_columns(dx, limit).tolist() == [0, 2, 3]
    assert filtering.active_columns(dx[:, :1], limit) is None
    assert filtering.active_columns(dx[:, 1:2], limit).tolist() == []
