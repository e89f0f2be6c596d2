"""segment_sum: fp64 sums over packed sequences, correctly rounded values as the oracle."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import BF16, FP16, FP32, FP64
from closeness import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkern.ops.segment_sum import segment_sum

LAYOUTS = {
    "one_sequence": [0, 50],
    "ragged": [0, 1, 18, 19, 50],
    "empty_first_middle_last": [0, 0, 20, 20, 20, 50, 50],
    "all_empty_but_one": [0, 0, 0, 50],
    "every_token_its_own": list(range(51)),
}
layouts = pytest.mark.parametrize("cu", LAYOUTS.values(), ids=LAYOUTS)


def boundaries(cu):
    return torch.tensor(cu, dtype=torch.int32)


def check(backend, values, cu, weights):
    """A sum of n doubles is wrong by at most n eps sum |terms|; gradients are single products."""
    values = values.clone().requires_grad_()
    weights = None if weights is None else weights.clone().requires_grad_()
    out = segment_sum(values, boundaries(cu), weights=weights, backend=backend)
    rows = values if values.dim() == 2 else values[None]
    want = oracles.segment_sum(rows, cu, weights)
    size = oracles.segment_sum(rows.abs(), cu, None if weights is None else weights.abs())
    assert out.dtype == FP64 and out.shape == (*values.shape[:-1], len(cu) - 1)
    got = out.detach().reshape(rows.shape[0], -1).numpy()
    limit = values.shape[-1] * torch.finfo(FP64).eps * size
    assert (abs(got - want) <= limit).all(), (
        f"off by {abs(got - want).max():.2e}, allowed {limit.max():.2e}"
    )
    up = torch.randn(out.shape, dtype=FP64)
    (out * up).sum().backward()
    d_values, d_weights = oracles.segment_sum_grads(
        up.reshape(rows.shape[0], -1), rows, cu, weights
    )
    unit = torch.finfo(values.dtype).eps
    assert values.grad.dtype == values.dtype
    assert values.grad.shape == values.shape
    torch.testing.assert_close(
        values.grad.double().reshape(rows.shape), torch.from_numpy(d_values), rtol=unit, atol=1e-7
    )
    if weights is not None:
        assert weights.grad.dtype == weights.dtype and weights.grad.shape == weights.shape
        torch.testing.assert_close(
            weights.grad.double(),
            torch.from_numpy(d_weights),
            rtol=4 * torch.finfo(weights.dtype).eps,
            atol=1e-6,
        )


@layouts
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("weighted", ["unweighted", "one_row_of_weights", "weights_per_value"])
def test_sums_and_gradients(backend, weighted, dtype, cu):
    values = torch.randn(3, 50).to(dtype)
    weights = {
        "unweighted": None,
        "one_row_of_weights": torch.randn(50),
        "weights_per_value": torch.randn(3, 50),
    }
    check(backend, values, cu, weights[weighted])


@layouts
def test_one_row_of_values(backend, cu):
    check(backend, torch.randn(50), cu, None)
    check(backend, torch.randn(50), cu, torch.rand(50))


def test_long_sums_keep_their_digits(backend):
    """8,192 log-probabilities near -1.2 nats: an fp32 accumulator would be off by about 2e-2."""
    values = -1.2 + 0.5 * torch.randn(8192)
    got = segment_sum(values, boundaries([0, 8192]), backend=backend).item()
    want = oracles.segment_sum(values[None], [0, 8192])[0, 0]
    assert abs(got - want) < 1e-9


def test_catastrophic_cancellation(backend):
    values = torch.tensor([1e8, 1.0, -1e8, 1e-3])
    got = segment_sum(values, boundaries([0, 4]), backend=backend).item()
    assert got == pytest.approx(1.001, abs=1e-7)


def test_no_tokens_and_no_sequences(backend):
    assert segment_sum(torch.zeros(0), boundaries([0, 0, 0]), backend=backend).tolist() == [
        0.0,
        0.0,
    ]
    assert segment_sum(torch.zeros(0), boundaries([0]), backend=backend).shape == (0,)
    assert segment_sum(torch.zeros(2, 0), boundaries([0, 0]), backend=backend).shape == (2, 1)


def test_a_weight_of_zero_hides_nan(backend):
    """Select, not multiply: a masked token may hold anything, and gets no gradient."""
    values = torch.tensor([1.0, float("nan"), 2.0, float("inf")], requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])
    out = segment_sum(values, boundaries([0, 2, 4]), weights=weights, backend=backend)
    assert out.tolist() == [1.0, 1.0]
    out.sum().backward()
    assert values.grad.tolist() == [1.0, 0.0, 0.5, 0.0]


def test_nan_stays_in_its_sequence(backend):
    values = torch.tensor([1.0, float("nan"), 2.0, 3.0])
    out = segment_sum(values, boundaries([0, 2, 4]), backend=backend)
    assert out[0].isnan() and out[1].item() == 5.0


def test_int64_boundaries_are_accepted(backend):
    values = torch.randn(10)
    a = segment_sum(values, torch.tensor([0, 4, 10]), backend=backend)
    b = segment_sum(values, boundaries([0, 4, 10]), backend=backend)
    assert_same_bits(a, b)


def test_gradcheck(backend):
    values = torch.randn(2, 12, dtype=FP64, requires_grad=True)
    weights = torch.randn(12, dtype=FP64, requires_grad=True)
    cu = boundaries([0, 5, 5, 12])
    assert torch.autograd.gradcheck(
        lambda v, w: segment_sum(v, cu, weights=w, backend=backend), (values, weights)
    )
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, cu, backend=backend), (values,))


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def test_any_ragged_layout(backend):
    # an interpreted kernel takes milliseconds per sequence
    examples = 8 if backend == "triton" else 40
    arguments = given(lengths=LENGTHS, seed=st.integers(0, 2**20), weighted=st.booleans())
    settings(max_examples=examples, deadline=None, derandomize=True)(
        arguments(lambda **drawn: check_layout(backend, **drawn))
    )()


def check_layout(backend, lengths, seed, weighted):
    g = torch.Generator().manual_seed(seed)
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    values = torch.randn(2, cu[-1], generator=g)
    check(backend, values, cu, torch.randn(cu[-1], generator=g) if weighted else None)


@pytest.mark.parametrize(
    ("cu", "match"),
    [
        (torch.tensor([1, 4], dtype=torch.int32), "start at 0"),
        (torch.tensor([0, 3], dtype=torch.int32), "end at 4"),
        (torch.tensor([0, 5], dtype=torch.int32), "end at 4"),
        (torch.tensor([0, 3, 2, 4], dtype=torch.int32), "decrease"),
        (torch.tensor([0.0, 4.0]), "int32"),
        (torch.tensor([[0, 4]], dtype=torch.int32), "1-d"),
        (torch.zeros(0, dtype=torch.int32), "cu_seqlens"),
        ([0, 4], "Tensor"),
    ],
    ids=["not_from_0", "short", "long", "unsorted", "float", "2d", "empty", "list"],
)
def test_bad_boundaries(backend, cu, match):
    with pytest.raises(ValueError, match=match):
        segment_sum(torch.zeros(4), cu, backend=backend)


@pytest.mark.parametrize(
    "weights", [torch.zeros(3), torch.zeros(2, 4), torch.zeros(4, dtype=torch.long)]
)
def test_bad_weights(backend, weights):
    with pytest.raises(ValueError, match="weights"):
        segment_sum(
            torch.zeros(3, 4),
            torch.tensor([0, 4], dtype=torch.int32),
            weights=weights,
            backend=backend,
        )


@pytest.mark.parametrize("values", [torch.zeros(1, 2, 4), torch.zeros(4, dtype=torch.long), 3.0])
def test_bad_values(backend, values):
    with pytest.raises(ValueError, match="values"):
        segment_sum(values, torch.tensor([0, 4], dtype=torch.int32), backend=backend)
