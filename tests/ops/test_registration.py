"""The custom ops as torch.library and torch.compile see them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from cases import BF16, FP32, IGNORE, OPS, OPTIONS, PLAIN, SMALL, Regime, ops, upstream_for
from closeness import assert_same_bits
from op_checks import call, inputs_of, run_op, stats_of, weighted_sum
from torch.utils._python_dispatch import TorchDispatchMode

import prefkern
from prefkern.ops.segment_sum import segment_sum


class Recorder(TorchDispatchMode):
    """Records every prefkern op that is dispatched, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prefkern":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded_calls(backend):
    """One call of every custom op, forward and backward, over the argument patterns they take."""
    with Recorder() as recorder:
        for option in (PLAIN, OPTIONS[-1]):
            for op in OPS:
                inputs = inputs_of(op, Regime("opcheck", N=9, V=11, D=4), FP32, option=option)
                stats = ("logp", "ent") if op == "linear_logps" else ("logp", "fkl")
                for wanted in (("hidden", "weight", "bias"), ("hidden",)):
                    run_op(
                        backend,
                        inputs,
                        stats,
                        upstream_for(stats, 9, FP32),
                        option=option,
                        wanted=wanted,
                    )
                run_op(backend, inputs, stats_of(op), None, option=option)
        z = torch.randn(5, 7, requires_grad=True)
        targets = torch.tensor([0, 6, IGNORE, 3, 3])
        for ref in (None, torch.randn(5, 7)):
            prefkern.logits_logps(z, targets, ref_logits=ref, backend=backend).logp.sum().backward()
        values = torch.randn(2, 6, requires_grad=True)
        weights = torch.rand(6, requires_grad=True)
        cu = torch.tensor([0, 2, 6], dtype=torch.int32)
        segment_sum(values, cu, backend=backend).sum().backward()
        segment_sum(values, cu, weights=weights, backend=backend).sum().backward()
    return recorder.calls


def test_opcheck_of_every_op(backend):
    """Schema, aliasing, fake tensors, autograd registration, AOT dispatch of each call."""
    calls = recorded_calls(backend)
    names = {func._schema.name for func, _, _ in calls}
    for stem in ("head", "segment_sum"):
        for part in ("fwd", "bwd"):
            assert f"prefkern::{stem}_{part}" in names
    for func, args, kwargs in calls:

        def fresh(x, grad):
            if isinstance(x, list):
                return [fresh(t, grad) for t in x]
            if not isinstance(x, torch.Tensor):
                return x
            return x.detach().clone().requires_grad_(grad and x.is_floating_point())

        forward = func._schema.name.endswith("_fwd")
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        # the head op gets its gradients from an autograd function around it
        trained = () if "plan" in given else ("values", "weights")
        copies = [fresh(a, forward and name in trained) for name, a in given.items()]
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if forward:
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(func, tuple(copies), copy.copy(kwargs), test_utils=tests)


@ops
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen_head"])
def test_fullgraph_compile_equals_eager(backend, op, frozen):
    """aot_eager: the whole graph is traced, the op stays opaque, the bits are eager's."""
    inputs = inputs_of(op, SMALL, FP32, option=OPTIONS[-1])
    stats = ("logp", "ent", "top1") if op == "linear_logps" else ("logp", "ref_logp", "fkl")
    upstream = upstream_for(stats, 23, FP32)

    def step(hidden, weight):
        values = call(op, backend, inputs, hidden, weight, stats, scale=0.9, softcap=5.0)
        return weighted_sum(values, upstream), values

    torch._dynamo.reset()
    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight = (
            inputs.hidden.clone().requires_grad_(),
            inputs.weight.clone().requires_grad_(not frozen),
        )
        loss, values = f(hidden, weight)
        loss.backward()
        results.append(
            (loss.detach(), hidden.grad, weight.grad, *(values[s].detach() for s in stats))
        )
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_compile_with_varying_row_counts(backend):
    """One graph serves several N; no graph break, no recompilation per size."""
    torch._dynamo.reset()
    weight = torch.randn(19, 6)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(hidden, targets):
        return prefkern.linear_logps(
            hidden, weight, targets, stats=("logp", "ent"), backend=backend
        ).logp.sum()

    for n in (5, 8, 13, 40):
        hidden = torch.randn(n, 6, requires_grad=True)
        targets = torch.randint(0, 19, (n,))
        targets[0] = IGNORE
        got = step(hidden, targets)
        (grad,) = torch.autograd.grad(got, hidden)
        want = prefkern.linear_logps(
            hidden, weight, targets, stats=("logp", "ent"), backend=backend
        ).logp.sum()
        (want_grad,) = torch.autograd.grad(want, hidden)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
        if backend == "triton":
            # a trace without num_scored computes ignored rows too: torch's products have another
            # shape then, and may round otherwise
            torch.testing.assert_close(grad, want_grad, rtol=2e-6, atol=1e-6)
        else:
            assert_same_bits(grad, want_grad, f"d_hidden at N={n}")
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs for four sizes"


def test_inductor_and_the_small_ops(backend):
    """The default compiler on logits_logps and segment_sum in one graph."""
    torch._dynamo.reset()
    targets = torch.tensor([0, 6, IGNORE, 3, 3])
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)

    def step(z):
        logp = prefkern.logits_logps(z, targets, backend=backend).logp
        return segment_sum(logp, cu, backend=backend).sum()

    z = torch.randn(5, 7, requires_grad=True)
    got, want = torch.compile(step, fullgraph=True)(z), step(z)
    assert_same_bits(got.detach(), want.detach())
    for a, b in zip(torch.autograd.grad(got, z), torch.autograd.grad(want, z), strict=True):
        assert_same_bits(a, b)


@ops
def test_fake_tensors(backend, op):
    """Shapes and dtypes without data; num_scored stands in for the count that cannot be read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = inputs_of(op, SMALL, BF16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hidden = mode.from_tensor(inputs.hidden).requires_grad_()
        weight = mode.from_tensor(inputs.weight)
        fake = inputs.replace(
            **{
                k: mode.from_tensor(getattr(inputs, k))
                for k in ("targets", "ref_hidden", "ref_weight", "values")
                if getattr(inputs, k) is not None
            }
        )
        stats = ("logp", "ent") if op == "linear_logps" else ("logp", "fkl")
        values = call(op, backend, fake, hidden, weight, stats, num_scored=15)
        for value in values.values():
            assert value.shape == (23,) and value.dtype == FP32
