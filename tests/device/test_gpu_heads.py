"""The head ops on a GPU: closeness, masked rows, budgets, graphs, compile, sizes past 2^31.

Skipped without a GPU (`--stand-in` runs what Triton's interpreter can); `python -m
benchmarks.device_check` runs this folder with `-n 8`. The same kernels run on the CPU (interpreter,
emulation) in tests/kernels and tests/cuda.
"""

from __future__ import annotations

import pytest
import torch
from cases import (
    BF16,
    FP16,
    FP32,
    OPTIONS,
    PARTIAL,
    REGIMES,
    SMALL,
    Regime,
    upstream_for,
)
from op_checks import (
    assert_same_run,
    check_closeness,
    check_masked_rows,
    inputs_of,
    run_op,
    stats_of,
)

import prefkern
from prefkern.backends import memory

both_ops = pytest.mark.parametrize("op", ("linear_logps", "linear_divergence"))
dtypes = pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=("fp32", "bf16", "fp16"))
# several tiles of columns, the last ragged, at a few seconds of oracle for all backends
WIDE = Regime("wide_vocabulary", N=70, V=4099, D=64)


@both_ops
@dtypes
@pytest.mark.parametrize("regime", (*REGIMES, WIDE), ids=lambda r: r.why)
def test_closeness(gpu, op, dtype, regime):
    check_closeness(gpu, inputs_of(op, regime, dtype), stats_of(op))


@both_ops
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.why)
def test_logit_options(gpu, op, dtype, option):
    inputs = inputs_of(op, SMALL, dtype, option=option)
    check_closeness(gpu, inputs, stats_of(op), option=option)


@both_ops
@dtypes
def test_frozen_head(gpu, op, dtype):
    stats = ("logp", "ent") if op == "linear_logps" else ("logp", "ref_logp", "fkl", "rkl")
    check_closeness(gpu, inputs_of(op, WIDE, dtype), stats, wanted=("hidden",))


@both_ops
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
def test_one_row_over_several_tiles(gpu, op, dtype, monkeypatch):
    """The sums of dH and dW start from [1, D], which libraries take for a bias."""
    monkeypatch.setattr(memory, "tile_bytes", lambda device: 1 << 12)
    one = Regime("one_row", N=1, V=4099, D=64, ignored="none")
    check_closeness(gpu, inputs_of(op, one, dtype), stats_of(op))


@both_ops
@pytest.mark.parametrize("poison", (float("nan"), float("inf")), ids=str)
def test_ignored_rows(gpu, op, poison):
    check_masked_rows(gpu, inputs_of(op, PARTIAL, FP32), stats_of(op), poison)


@both_ops
@dtypes
def test_the_budget_and_a_second_run_change_no_bit(gpu, op, dtype):
    inputs, stats = inputs_of(op, WIDE, dtype), stats_of(op)
    upstream = upstream_for(stats, WIDE.N, dtype)
    row = 2 * WIDE.V * dtype.itemsize
    base = run_op(gpu, inputs, stats, upstream, memory_budget=0)
    for budget in (0, 30 * row, 1 << 30):
        again = run_op(gpu, inputs, stats, upstream, memory_budget=budget)
        assert_same_run(again, base, f"budget {budget}")


def arguments(op, device, dtype=BF16):
    inputs = inputs_of(op, WIDE, dtype).to(device)
    hidden = inputs.hidden.requires_grad_(True)
    weight = inputs.weight.requires_grad_(True)
    scored = int((inputs.targets != -100).sum())
    return inputs, hidden, weight, scored


def forward(op, gpu, inputs, hidden, weight, scored):
    stats = ("logp", "ent") if op == "linear_logps" else ("logp", "ref_logp", "fkl")
    options = {"stats": stats, "num_scored": scored, "backend": gpu}
    if op == "linear_logps":
        found = prefkern.linear_logps(hidden, weight, inputs.targets, **options)
        return found.logp.sum() + found.ent.sum()
    found = prefkern.linear_divergence(
        hidden, weight, inputs.targets, inputs.ref_hidden, inputs.ref_weight, **options
    )
    return found.logp.sum() + found.fkl.sum()


@both_ops
@pytest.mark.usefixtures("features")
def test_no_synchronisation_when_the_count_is_given(gpu, device, op):
    inputs, hidden, weight, scored = arguments(op, device)
    forward(op, gpu, inputs, hidden, weight, scored).backward()  # compiles outside
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(op, gpu, inputs, hidden, weight, scored).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both_ops
@pytest.mark.parametrize("counted", (True, False), ids=("num_scored", "masked"))
@pytest.mark.usefixtures("features")
def test_a_captured_step_replays_with_new_inputs(gpu, device, op, counted):
    inputs, hidden, weight, scored = arguments(op, device)
    count = scored if counted else None

    def step():
        hidden.grad = weight.grad = None
        loss = forward(op, gpu, inputs, hidden, weight, count)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured_hidden, captured_weight = hidden.grad, weight.grad
    with torch.no_grad():
        hidden.copy_(hidden.flip(0))
    graph.replay()
    got = captured.clone(), captured_hidden.clone(), captured_weight.clone()
    want = step()
    torch.testing.assert_close(got[0], want.detach(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(got[1], hidden.grad, rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(got[2], weight.grad, rtol=2e-2, atol=1e-4)


@both_ops
def test_compiled_without_a_graph_break(gpu, device, op):
    inputs, hidden, weight, scored = arguments(op, device)
    eager = forward(op, gpu, inputs, hidden, weight, scored)
    compiled = torch.compile(forward, fullgraph=True)
    found = compiled(op, gpu, inputs, hidden, weight, scored)
    torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-4)
    found.backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.usefixtures("features")
@pytest.mark.xdist_group("40 GiB")  # one at a time
@pytest.mark.parametrize("which", ("tokens", "head"))
def test_more_than_2_to_the_31_elements(gpu, which):
    """N * V, or V * D, past the range of 32-bit offsets; sampled rows against float64."""
    n, v, d = (20_000, 131_072, 64) if which == "tokens" else (40, 540_000, 4096)
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, d, generator=g, device="cuda", dtype=BF16).requires_grad_(True)
    weight = (torch.randn(v, d, generator=g, device="cuda", dtype=BF16) * (2 / d**0.5)).detach()
    weight.requires_grad_(True)
    y = torch.randint(0, v, (n,), generator=g, device="cuda")
    y[-1] = v - 1
    found = prefkern.linear_logps(
        hidden, weight, y, num_scored=n, memory_budget=1 << 40, backend=gpu
    ).logp
    found.sum().backward()
    rows = torch.tensor([0, 1, n // 2, n - 1], device="cuda")
    z = hidden.detach()[rows].double() @ weight.detach().double().T
    lp = z.log_softmax(1)
    torch.testing.assert_close(
        found.detach()[rows].double(), lp.gather(1, y[rows][:, None])[:, 0], rtol=0, atol=5e-2
    )
    dz = -lp.exp()
    dz[torch.arange(4), y[rows]] += 1
    want = dz @ weight.detach().double()
    gap = (hidden.grad[rows].double() - want).norm() / want.norm()
    assert gap < 2e-2, float(gap)
    assert torch.isfinite(weight.grad).all()
    assert bool((weight.grad[-1] != 0).any()), "the last head row got no gradient"
