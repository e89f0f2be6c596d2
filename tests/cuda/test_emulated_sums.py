"""CUDA kernels of segment_sum in emulation (tests/emulation.py), against the eager twin in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import FP32, FP64
from closeness import assert_same_bits
from emulation import Segments, needed, program
from torch import Tensor

from prefkern.backends.eager import segment_sum as reference_sum
from prefkern.losses import weights as stages

pytestmark = needed


def emulated():
    return program("sums", "segment_sum")


# Chunks are 512 tokens: lengths around them, starts on and off their multiples.
LENGTHS = {
    "short": [3, 0, 1, 40, 0, 6],
    "chunks": [512, 512, 0, 511, 1, 513, 1024, 1023],
    "long": [7, 5000, 0, 0, 1537],
    "one": [2048],
    "nothing": [0, 0],
}


def boundaries(lengths) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def check_sums(cases: list[Segments]) -> None:
    """Sums to n eps of the sum of sizes; slopes, which are single products, to a rounding."""
    for c, (out, d_values, d_weights) in zip(cases, emulated().segments(cases), strict=True):
        want = reference_sum.segment_sum_fwd(c.values, c.weights, c.cu)
        size = reference_sum.segment_sum_fwd(
            c.values.abs(), None if c.weights is None else c.weights.abs(), c.cu
        )
        assert ((out - want).abs() <= c.values.shape[1] * torch.finfo(FP64).eps * size).all()
        d_out = torch.ones_like(out) if c.d_out is None else c.d_out
        need = c.weights is not None
        slopes = reference_sum.segment_sum_bwd(d_out, c.values, c.weights, c.cu, True, need)
        for got, slope in zip((d_values, d_weights)[: 1 + need], slopes, strict=False):
            torch.testing.assert_close(
                got, slope, rtol=4 * torch.finfo(slope.dtype).eps, atol=1e-14
            )


@pytest.mark.parametrize("layout", LENGTHS)
def test_sums_and_slopes(layout):
    cu, n = boundaries(LENGTHS[layout]), sum(LENGTHS[layout])
    cases = []
    for m, dtype, w_dtype in ((1, FP32, FP32), (5, FP32, FP64), (4, FP64, FP32), (2, FP64, FP64)):
        values, d_out = torch.randn(m, n).to(dtype), torch.randn(m, cu.numel() - 1, dtype=FP64)
        for shape in (None, (n,), (m, n)):
            weights = None if shape is None else torch.randn(shape).to(w_dtype)
            if weights is not None:
                weights[..., ::3] = 0.0
            cases.append(Segments(values, cu, weights, d_out))
    check_sums(cases)
    for first, second in zip(
        emulated().segments(cases), emulated().segments([c._replace(reverse=True) for c in cases]),
        strict=True,
    ):  # fmt: skip
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)


def test_a_sum_has_the_same_bits_anywhere_in_the_batch():
    values = torch.randn(1, 1300)
    alone = emulated().segments([Segments(values, boundaries([1300]))])[0][0]
    for before in (1, 511, 512, 700):
        batch = torch.cat([torch.randn(1, before), values, torch.randn(1, 30)], 1)
        out = emulated().segments([Segments(batch, boundaries([before, 1300, 30]))])[0][0]
        assert_same_bits(out[:, 1], alone[:, 0])


def test_a_weight_of_zero_hides_any_value():
    values = torch.tensor([[1.0, torch.nan, 2.0, torch.inf], [1.0, 1.0, torch.nan, 4.0]])
    weights = torch.tensor([[1.0, 0.0, 0.5, 0.0], [1.0, 1.0, 0.0, 2.0]])
    d_out = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=FP64)
    case = Segments(values, boundaries([2, 2]), weights, d_out)
    out, d_values, d_weights = emulated().segments([case])[0]
    assert out.tolist() == [[1.0, 1.0], [2.0, 8.0]]
    assert d_values.tolist() == [[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 2.0]]
    assert d_weights[1].tolist()[:2] == [0.0, 0.0] and d_weights[1, 3] == 4.0


@pytest.mark.parametrize("shape", [None, (3000,), (2, 3000)], ids=str)
def test_tokens_that_no_sequence_holds_have_gradient_0(shape):
    """The memory of the gradients is NaN before the kernel runs."""
    values = torch.randn(2, 3000)
    values[:, :900], values[:, 2500:] = torch.nan, torch.inf
    weights = None if shape is None else torch.randn(shape)
    cu = boundaries([700, 0, 900]) + 900
    d_out = torch.randn(2, 3, dtype=FP64)
    case = Segments(values, cu, weights, d_out)
    ((out, d_values, d_weights),) = emulated().segments([case])
    need = weights is not None
    want = reference_sum.segment_sum_fwd(values, weights, cu)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    slopes = reference_sum.segment_sum_bwd(d_out, values, weights, cu, True, need)
    for got, slope in zip((d_values, d_weights)[: 1 + need], slopes, strict=False):
        torch.testing.assert_close(got, slope, rtol=4 * torch.finfo(FP32).eps, atol=1e-14)
        assert (got[..., :900] == 0).all() and (got[..., 2500:] == 0).all()


def stage_weights(stage: str, cu: Tensor, scored: Tensor, statistics: tuple[str, ...]) -> Tensor:
    """[N] or [m, N] weights that a stage hands to the sums."""
    n, s = scored.numel(), cu.numel() - 1
    if stage == "completion":
        return scored.to(FP32)
    if stage == "ld_dpo":
        public = torch.arange(1, s + 1) * 2
        return stages.ld_dpo(cu, scored, public, alpha=0.3).weights
    if stage == "tgdpo":
        sign = torch.randn(n).sign()
        return stages.tgdpo(torch.randn(n), torch.randn(n), sign, scored).weights
    masks = stages.sparsepo(cu, scored, torch.rand(n).relu(), torch.rand(n)).weights
    return torch.stack([masks["fkl" if name == "fkl" else "logp"] for name in statistics])


@pytest.mark.parametrize("stage", ["completion", "ld_dpo", "sparsepo", "tgdpo"])
def test_token_weights_are_applied_while_summing(stage):
    """One pass: a token's weight is read once for the statistics it weighs, and tokens that do not
    count may hold anything."""
    cu = boundaries([37, 0, 600, 1, 90])
    scored = torch.rand(int(cu[-1])) < 0.7
    statistics = ("logp", "ref_logp", "fkl")
    weights = stage_weights(stage, cu, scored, statistics).to(FP32)
    values = torch.randn(3, scored.numel())
    d_out = torch.randn(3, cu.numel() - 1, dtype=FP64)
    check_sums([Segments(values, cu, weights, d_out)])
    hidden = torch.where(scored, values, torch.nan)
    (out, d_values, _), (want, want_slope, _) = emulated().segments(
        [Segments(hidden, cu, weights, d_out), Segments(values, cu, weights, d_out)]
    )
    assert_same_bits(out, want)
    assert_same_bits(d_values, want_slope)


def test_elements_past_two_to_the_31():
    assert emulated().run(b"far\n") == b"ok"
