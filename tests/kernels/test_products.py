"""Library products of the driver: settings that the process may have, and what a torch may lack."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP32

from prefkern.backends.tiled import products


@pytest.mark.parametrize("how", ["older", "newer", "neither"])
def test_products_are_ieee_whatever_the_caller_allows(how):
    """Settings only; the products themselves need a GPU. Both ways of allowing tf32 are undone
    within, agree with each other there, and come back."""
    flags = torch.backends.cuda.matmul
    before, precision = flags.fp32_precision, torch.get_float32_matmul_precision()
    try:
        if how == "older":
            flags.allow_tf32 = True
        elif how == "newer":
            flags.fp32_precision = "tf32"
        flags.allow_fp16_accumulation = True
        outside = flags.fp32_precision
        cuda = torch.device("cuda")
        # a second thread enters before the first leaves, and leaves after it
        first, second = products.full_precision(cuda), products.full_precision(cuda)
        first.__enter__()
        with second:
            first.__exit__(None, None, None)
            assert flags.fp32_precision != "tf32"
            assert not flags.allow_fp16_accumulation
            assert not flags.allow_tf32  # raises where the two disagree
            assert not flags.allow_bf16_reduced_precision_reduction
            assert not flags.allow_fp16_reduced_precision_reduction
        assert flags.fp32_precision == outside
        assert flags.allow_bf16_reduced_precision_reduction and flags.allow_fp16_accumulation
        if how == "older":
            assert flags.allow_tf32
    finally:
        flags.allow_fp16_accumulation = False
        if how == "older":
            torch.set_float32_matmul_precision(precision)
        flags.fp32_precision = before


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def calls(monkeypatch):
    """Library products stubbed: what was asked for, and which of them take out_dtype."""
    seen, offers = [], {"mm": True, "addmm": True}

    def stub(name, compute):
        def call(*args, out=None, out_dtype=None):
            wide = [x.as_subclass(torch.Tensor) for x in args]
            if out_dtype is not None:
                if not offers[name]:
                    raise RuntimeError("self and mat2 must have the same dtype")
                wide = [x.to(out_dtype) for x in wide]
            seen.append((name, out_dtype))
            found = compute(*wide)
            return found if out is None else out.copy_(found)

        monkeypatch.setattr(torch, name, call)

    stub("mm", lambda a, b: a @ b)
    stub("addmm", lambda c, a, b: c + a @ b)
    products.offers_fp32.cache_clear()
    yield seen, offers
    products.offers_fp32.cache_clear()


@pytest.mark.parametrize("without", [(), ("addmm",), ("mm", "addmm")], ids=str)
def test_a_torch_without_out_dtype_adds_in_fp32_all_the_same(calls, without):
    """Probed once per device: 16-bit operands, fp32 sums, whatever the release takes."""
    seen, offers = calls
    offers |= dict.fromkeys(without, False)
    a, b = torch.randn(5, 7).to(BF16), torch.randn(7, 4).to(BF16)
    want = a.float() @ b.float()
    on = [x.as_subclass(OnGpu) for x in (a, b)]
    total = torch.zeros(5, 4)
    for fresh in (True, False, False):
        products.add_product(*on, total, fresh=fresh)
    torch.testing.assert_close(total, 3 * want)
    assert ("addmm", FP32) in seen or "addmm" in without
    probes = [x for x in seen if x[1] is not None]
    # beside the probes no function is asked for what it does not offer
    assert all(name not in without for name, _ in probes)
