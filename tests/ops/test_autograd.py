"""Gradients as autograd uses them: finite differences, second passes, modes, checkpoints."""

from __future__ import annotations

import pytest
import torch
from cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    IGNORE,
    OPTIONS,
    PARTIAL,
    PLAIN,
    SMALL,
    TWO_MODEL,
    Regime,
    differentiable,
    dtypes,
    field_of,
    ops,
    upstream_for,
)
from closeness import assert_same_bits
from op_checks import assert_same_run, call, inputs_of, run_op, stats_of, weighted_sum
from torch.utils.checkpoint import checkpoint

import prefkern


@ops
@pytest.mark.parametrize("option", [PLAIN, OPTIONS[0], OPTIONS[-1]], ids=lambda o: o.why)
def test_gradcheck(backend, op, option):
    """Finite differences of every statistic with respect to hidden, weight and bias, in fp64."""
    inputs = inputs_of(op, Regime("gradcheck", N=5, V=7, D=3), FP64, option=option)
    stats = differentiable(stats_of(op))
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    tensors = [hidden, weight]
    if inputs.bias is not None:
        tensors.append(inputs.bias.clone().requires_grad_())

    def f(h, w, b=None):
        return tuple(call(op, backend, inputs, h, w, stats, b, **option.numbers()).values())

    # the interpreter is slow: one random direction instead of every entry
    fast = backend == "triton"
    assert torch.autograd.gradcheck(f, tensors, eps=1e-6, atol=1e-6, fast_mode=fast)


@pytest.mark.parametrize("stats", [("logp", "ent"), ("zy", "lse")], ids=",".join)
def test_gradcheck_of_a_frozen_head(backend, stats):
    inputs = inputs_of("linear_logps", Regime("gradcheck", N=5, V=7, D=3), FP64)
    hidden = inputs.hidden.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h: tuple(call("linear_logps", backend, inputs, h, inputs.weight, stats).values()),
        (hidden,),
    )


def test_gradcheck_of_logits(backend):
    z = torch.randn(5, 7, dtype=FP64, requires_grad=True)
    zr = torch.randn(5, 7, dtype=FP64)
    targets = torch.tensor([0, 6, IGNORE, 3, 3])
    stats = differentiable(s for s in TWO_MODEL if s != "ev")

    def f(logits):
        out = prefkern.logits_logps(
            logits, targets, ref_logits=zr, stats=stats, temperature=0.8, backend=backend
        )
        return tuple(getattr(out, field_of(s)) for s in stats)

    fast = backend == "triton"
    assert torch.autograd.gradcheck(f, (z,), eps=1e-6, atol=1e-6, fast_mode=fast)


@ops
@dtypes
def test_a_second_backward_gives_the_same_bits(backend, op, dtype):
    """retain_graph: the first backward must not write over what the second one reads."""
    inputs = inputs_of(op, SMALL, dtype)
    for frozen, stats in ((False, stats_of(op)), (True, ("logp",))):
        upstream = upstream_for(stats, 23, dtype)
        hidden = inputs.hidden.clone().requires_grad_()
        weight = inputs.weight.clone().requires_grad_(not frozen)
        values = call(op, backend, inputs, hidden, weight, stats)
        wanted = (hidden,) if frozen else (hidden, weight)
        before = {s: v.detach().clone() for s, v in values.items()}
        first = torch.autograd.grad(weighted_sum(values, upstream), wanted, retain_graph=True)
        second = torch.autograd.grad(weighted_sum(values, upstream), wanted, retain_graph=True)
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b, "gradient")
        for s, v in values.items():
            assert_same_bits(v.detach(), before[s], s)


@ops
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen_head"])
def test_double_backward_is_refused(backend, op, frozen):
    inputs = inputs_of(op, SMALL, FP64)
    hidden, weight = (
        inputs.hidden.clone().requires_grad_(),
        inputs.weight.clone().requires_grad_(not frozen),
    )
    values = call(op, backend, inputs, hidden, weight, ("logp",))
    (grad,) = torch.autograd.grad(values["logp"].square().sum(), (hidden,), create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()


def test_double_backward_is_refused_by_the_small_ops(backend):
    z = torch.randn(4, 6, dtype=FP64, requires_grad=True)
    out = prefkern.logits_logps(z, torch.tensor([0, 1, 2, 3]), backend=backend).logp
    (grad,) = torch.autograd.grad(out.square().sum(), (z,), create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@ops
def test_only_what_needs_a_gradient_gets_one(backend, op):
    inputs = inputs_of(op, SMALL, FP32)
    _, grads = run_op(
        backend, inputs, ("logp",), upstream_for(("logp",), 23, FP32), wanted=("weight",)
    )
    assert set(grads) == {"weight"} and grads["weight"] is not None
    assert inputs.hidden.grad is None


@ops
def test_a_statistic_that_the_loss_does_not_use(backend, op):
    """Asking for statistics changes no gradient: their upstream is 0 or absent."""
    inputs = inputs_of(op, SMALL, FP64)
    upstream = upstream_for(("logp",), 23, FP64)
    _, alone = run_op(backend, inputs, ("logp",), upstream)
    _, beside = run_op(backend, inputs, stats_of(op), upstream)
    for name in alone:
        torch.testing.assert_close(beside[name], alone[name], rtol=0, atol=1e-13)


# grad modes, checkpointing, autocast


@ops
@dtypes
def test_no_grad_gives_the_same_values(backend, op, dtype):
    inputs = inputs_of(op, SMALL, dtype)
    want, _ = run_op(backend, inputs, stats_of(op), upstream_for(stats_of(op), 23, dtype))
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = call(op, backend, inputs, hidden, weight, stats_of(op))
        for stat, value in got.items():
            assert not value.requires_grad
            assert_same_bits(value.clone(), want[stat], f"{stat} under {mode.__name__}")


@ops
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen_head"])
def test_inside_a_checkpoint_region(backend, op, frozen, reentrant):
    inputs = inputs_of(op, PARTIAL, FP32)
    stats = ("logp", "ent") if op == "linear_logps" else ("logp", "fkl")
    upstream = upstream_for(stats, 101, FP32)

    def run(wrap):
        hidden = inputs.hidden.clone().requires_grad_()
        weight = inputs.weight.clone().requires_grad_(not frozen)

        def body(h, w):
            return weighted_sum(call(op, backend, inputs, h * 1.0, w, stats), upstream)

        loss = (
            checkpoint(body, hidden, weight, use_reentrant=reentrant)
            if wrap
            else body(hidden, weight)
        )
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad

    for a, b in zip(run(True), run(False), strict=True):
        assert_same_bits(a, b)


@ops
def test_inside_saved_tensor_hooks(backend, op):
    """Offloading hooks move whatever was saved; the numbers stay."""
    inputs = inputs_of(op, SMALL, FP32)
    want = run_op(backend, inputs, stats_of(op), upstream_for(stats_of(op), 23, FP32))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy):
        got = run_op(backend, inputs, stats_of(op), upstream_for(stats_of(op), 23, FP32))
    assert_same_run(got, want, "saved tensor hooks")


@ops
@pytest.mark.parametrize("autocast", [BF16, FP16], ids=["bf16", "fp16"])
def test_autocast_sets_the_compute_dtype(backend, op, autocast):
    """fp32 tensors under autocast compute as if hidden were 16-bit; gradients keep their dtypes."""
    inputs = inputs_of(op, SMALL, FP32)
    stats = ("logp", "ent") if op == "linear_logps" else ("logp", "fkl")
    upstream = upstream_for(stats, 23, FP32)
    low = inputs.replace(hidden=inputs.hidden.to(autocast))
    want, want_grads = run_op(backend, low, stats, upstream)
    with torch.autocast("cpu", dtype=autocast):
        got, grads = run_op(backend, inputs, stats, upstream)
    for stat in stats:
        assert_same_bits(got[stat], want[stat], stat)
    assert grads["hidden"].dtype == FP32 and grads["weight"].dtype == FP32
    assert_same_bits(grads["hidden"].to(autocast), want_grads["hidden"], "d_hidden")
    assert_same_bits(grads["weight"], want_grads["weight"], "d_weight")


def test_autocast_leaves_fp64_alone(backend):
    inputs = inputs_of("linear_logps", SMALL, FP64)
    want, _ = run_op(backend, inputs, ("logp",), None)
    with torch.autocast("cpu", dtype=BF16):
        got, _ = run_op(backend, inputs, ("logp",), None)
    assert_same_bits(got["logp"], want["logp"])


def test_tied_embeddings(backend):
    """One parameter is the embedding and the head: its gradient is the sum of both uses."""
    ids = torch.randint(0, 29, (17,))
    targets = torch.randint(0, 29, (17,))
    table = torch.randn(29, 6, dtype=FP64, requires_grad=True)
    mix = torch.randn(6, 6, dtype=FP64)

    def loss(head):
        return -head(torch.tanh(table[ids] @ mix)).sum()

    (got,) = torch.autograd.grad(
        loss(lambda h: prefkern.linear_logps(h, table, targets, backend=backend).logp), table
    )
    (want,) = torch.autograd.grad(
        loss(lambda h: torch.log_softmax(h @ table.T, -1).gather(1, targets[:, None])), table
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
