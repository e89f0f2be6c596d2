"""The statistic ev = sum_v p_v A_v: sources of A, values and gradients."""

from __future__ import annotations

import baseline
import oracles
import pytest
import torch
from cases import FP32, FP64, IGNORE, SMALL, Regime, dtypes, make_inputs, upstream_for
from closeness import assert_no_worse, grad_floor, stat_floor

import prefkern


def check_ev(backend, inputs, values, dense, **arguments):
    """`values` as the op takes them, `dense` [N, V] as the oracle and the baseline take them."""
    dtype = inputs.hidden.dtype
    n = inputs.targets.numel()
    upstream = upstream_for(("ev", "logp"), n, dtype)
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    out = prefkern.linear_divergence(
        hidden,
        weight,
        inputs.targets,
        inputs.ref_hidden,
        inputs.ref_weight,
        stats=("logp", "ev"),
        backend=backend,
        **({} if values is None else {"values": values}),
        **arguments,
    )
    (out.ev * upstream["ev"] + out.logp * upstream["logp"]).sum().backward()
    truth = oracles.head_stats(
        inputs.hidden,
        inputs.weight,
        inputs.targets.numpy(),
        ("logp", "ev"),
        upstream,
        values=oracles.as_f64(dense),
    )
    base_h, base_w = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    z = baseline.head_logits(base_h, base_w)
    base = baseline.token_stats(z, inputs.targets, ("logp", "ev"), values=dense.to(z.dtype))
    (base["ev"] * upstream["ev"] + base["logp"] * upstream["logp"]).sum().backward()
    size = max(8.0, float(dense[dense.isfinite()].abs().max()))
    assert_no_worse(
        out.ev, base["ev"], truth.values["ev"], floor=stat_floor("ev", dtype, size), what="ev"
    )
    for name, got, plain in (("hidden", hidden, base_h), ("weight", weight, base_w)):
        assert_no_worse(
            got.grad,
            plain.grad,
            truth.grads[name],
            floor=grad_floor(dtype, size, truth, name),
            what=f"d_{name}",
        )


@dtypes
def test_ev_of_sparse_values(backend, dtype):
    """Top-k (index [N, k], value [N, k]) per row; every other entry is 0."""
    inputs = make_inputs(SMALL, dtype)
    g = torch.Generator().manual_seed(9)
    index = torch.stack([torch.randperm(61, generator=g)[:4] for _ in range(23)])
    value = torch.randn(23, 4, generator=g, dtype=FP64).to(FP64 if dtype == FP64 else FP32)
    dense = torch.zeros(23, 61, dtype=FP64).scatter(1, index, value.double())
    check_ev(backend, inputs, (index, value), dense)


def test_ev_of_an_index_listed_twice_adds_up(backend):
    """As in a sparse COO tensor."""
    inputs = make_inputs(SMALL, FP64)
    index = torch.tensor([[3, 7, 3]]).expand(23, 3)
    value = torch.tensor([[0.5, -1.0, 0.25]], dtype=FP64).expand(23, 3)
    dense = torch.zeros(23, 61, dtype=FP64)
    dense[:, 3], dense[:, 7] = 0.75, -1.0
    check_ev(backend, inputs, (index, value), dense)


def test_ev_ignores_the_values_of_ignored_rows(backend):
    """An index of -1 or a NaN value in a row without a label is never read."""
    inputs = make_inputs(SMALL, FP64)
    ignored = inputs.targets == IGNORE
    index, value = torch.full((23, 2), 5), torch.ones(23, 2, dtype=FP64)
    index[:, 1] = 9
    dense = torch.zeros(23, 61, dtype=FP64)
    dense[:, [5, 9]] = 1.0
    index[ignored], value[ignored] = -1, float("nan")
    check_ev(backend, inputs, (index, value), dense)


@dtypes
def test_ev_of_a_third_head(backend, dtype):
    """A = log r_aux - log r_ref, formed inside the op."""
    inputs = make_inputs(SMALL, dtype)
    other = make_inputs(Regime("aux", N=23, V=61, D=11), dtype, seed=5)
    lr, la = (
        torch.log_softmax(torch.from_numpy(oracles.head_logits(h, w)[0]), -1)
        for h, w in ((inputs.ref_hidden, inputs.ref_weight), (other.hidden, other.weight))
    )
    dense = la - lr
    check_ev(backend, inputs, None, dense, aux_hidden=other.hidden, aux_head=other.weight)


def test_dense_values_are_refused(backend):
    inputs = make_inputs(SMALL, FP32)
    with pytest.raises(ValueError, match="values"):
        prefkern.linear_divergence(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            inputs.ref_hidden,
            inputs.ref_weight,
            stats=("ev",),
            values=torch.zeros(23, 61),
            backend=backend,
        )


def test_ev_needs_exactly_one_source(backend):
    inputs = make_inputs(SMALL, FP32)
    base = (inputs.hidden, inputs.weight, inputs.targets, inputs.ref_hidden, inputs.ref_weight)
    with pytest.raises(ValueError, match="values"):
        prefkern.linear_divergence(*base, stats=("ev",), backend=backend)
    with pytest.raises(ValueError):
        prefkern.linear_divergence(
            *base,
            stats=("ev",),
            values=inputs.values,
            aux_hidden=inputs.hidden,
            aux_head=inputs.weight,
            backend=backend,
        )
