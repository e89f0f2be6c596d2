"""Same inputs, same bits; what a budget keeps, and that it changes no bit."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP16, FP32, OPTIONS, PARTIAL, PLAIN, Regime, dtypes, ops, upstream_for
from op_checks import assert_same_run, call, inputs_of, run_op, stats_of


@ops
@dtypes
def test_same_inputs_same_bits(backend, op, dtype):
    inputs = inputs_of(op, PARTIAL, dtype)
    upstream = upstream_for(stats_of(op), 101, dtype)
    first = run_op(backend, inputs, stats_of(op), upstream)
    for _ in range(2):
        assert_same_run(run_op(backend, inputs, stats_of(op), upstream), first, "second run")


@ops
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_thread_count_changes_no_bit(backend, op, dtype):
    if backend != "cpu":
        pytest.skip(f"the products of {backend} are torch's, which may be split by thread")
    inputs = inputs_of(op, Regime("threads", N=211, V=1031, D=40), dtype)
    upstream = upstream_for(stats_of(op), 211, dtype)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run_op(backend, inputs, stats_of(op), upstream))
    finally:
        torch.set_num_threads(before)
    assert_same_run(runs[1], runs[0], "2 threads against 1")
    assert_same_run(runs[2], runs[0], "3 threads against 1")


@ops
@dtypes
@pytest.mark.parametrize("option", [PLAIN, OPTIONS[-1]], ids=lambda o: o.why)
def test_the_budget_changes_no_bit(backend, op, dtype, option):
    """Keeping none, one, a few, most or all rows of logits gives the same bits."""
    inputs = inputs_of(op, PARTIAL, dtype, option=option)
    upstream = upstream_for(stats_of(op), 101, dtype)
    row = 61 * dtype.itemsize
    want = run_op(backend, inputs, stats_of(op), upstream, option=option, memory_budget=0)
    for budget in (row - 1, row, 2 * row, 33 * row, 64 * row, 1 << 16, None):
        got = run_op(backend, inputs, stats_of(op), upstream, option=option, memory_budget=budget)
        assert_same_run(got, want, f"memory_budget={budget}")


@pytest.mark.parametrize(
    ("op", "stat"),
    [("linear_logps", s) for s in ("logp", "ent", "col")]
    + [
        ("linear_divergence", s)
        for s in ("logp", "fkl", "rkl", "jsd:0.3", "tv", "bkl:3", "mix:0.25")
    ],
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_the_budget_changes_no_bit_of_one_statistic(backend, op, stat, dtype):
    inputs = inputs_of(op, PARTIAL, dtype)
    upstream = upstream_for((stat,), 101, dtype)
    want = run_op(backend, inputs, (stat,), upstream, memory_budget=0)
    for budget in (5000, None):
        assert_same_run(
            run_op(backend, inputs, (stat,), upstream, memory_budget=budget), want, str(budget)
        )


@ops
def test_a_budget_of_zero_keeps_no_logits(backend, op):
    """What a forward leaves for the backward grows with N, not N V; a budget is used."""
    n, v = 256, 4096
    inputs = inputs_of(op, Regime("memory", N=n, V=v, D=8, ignored="none"), FP32)
    stats = ("logp", "ent") if op == "linear_logps" else ("logp", "fkl")
    given = (inputs.hidden, inputs.weight, inputs.targets, inputs.ref_hidden, inputs.ref_weight)
    known = {x.untyped_storage().data_ptr() for x in given if x is not None}
    held = {}
    for budget in (0, None):
        values = call(
            op,
            backend,
            inputs,
            inputs.hidden.detach().requires_grad_(),
            inputs.weight.detach().requires_grad_(),
            stats,
            memory_budget=budget,
        )
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in saved_of(values["logp"])
        }
        held[budget] = sum(size for at, size in storages.items() if at not in known)
    assert held[0] < 64 * n * 4, f"{held[0]} bytes kept for {n} rows without a budget"
    assert held[None] >= n * v * 4, f"only {held[None]} bytes kept, {n} rows of {v} logits fit"


def saved_of(value):
    """Tensors saved by the op's node, found below `value`."""
    node = value.grad_fn
    while "prefkern" not in type(node).__name__.lower() and not getattr(node, "saved_tensors", ()):
        node = node.next_functions[0][0]
    return [x for x in node.saved_tensors if isinstance(x, torch.Tensor)]
