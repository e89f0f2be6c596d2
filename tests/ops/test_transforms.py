"""torch.func, vmap and batched gradients; a second derivative is refused by whatever way it is
asked for."""

from __future__ import annotations

import pytest
import torch
from cases import device_of

import prefkern

N, D, V = 6, 5, 11
G = torch.Generator().manual_seed(0)
HIDDEN, REF, WEIGHT = (torch.randn(n, D, generator=G) for n in (N, N, V))
TARGETS = torch.tensor([3, 0, -100, 10, 4, 1])
CU = torch.tensor([0, 4, N])


def ops(backend: str) -> dict:
    """A number per row (or group) of x [N, D], by the op that makes it."""
    at, device = {"backend": backend}, device_of(backend)
    ref, weight, y, cu = (t.to(device) for t in (REF, WEIGHT, TARGETS, CU))
    labels = torch.arange(float(N), device=device)
    return {
        "linear_logps": lambda x: prefkern.linear_logps(x, weight, y, **at).logp,
        "divergence": lambda x: prefkern.linear_divergence(x, weight, y, ref, **at).fkl,
        "frozen": lambda x: prefkern.linear_logps(x, weight, y, stats="ent", **at).ent,
        "logits": lambda x: prefkern.logits_logps(x, y.clamp(max=D - 1), **at).logp,
        "segment_sum": lambda x: prefkern.segment_sum(x[:, 0], cu, weights=x[:, 1], **at),
        "list_rank": lambda x: prefkern.list_rank(x[:, 0], labels, cu, family="softmax", **at),
        "error_sum": lambda x: prefkern.error_sum(x, ref, **at).err,
    }


@pytest.fixture(params=sorted(ops("eager")))
def op(request, backend):
    if backend not in ("cpu", "eager") and request.param not in ("linear_logps", "list_rank"):
        pytest.skip("nothing here depends on the kernels")
    return ops(backend)[request.param]


@pytest.fixture
def x(backend):
    return HIDDEN.to(device_of(backend))


def gradient(fn, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(fn(leaf).sum(), leaf)[0]


def test_gradients_of_torch_func(op, x):
    want = gradient(op, x)
    assert torch.equal(torch.func.grad(lambda a: op(a).sum())(x), want)
    out, pull = torch.func.vjp(op, x)
    assert torch.equal(pull(torch.ones_like(out))[0], want)
    torch.testing.assert_close(torch.func.jacrev(op)(x).sum(0), want)


def test_a_batch_of_inputs(op, x):
    both = torch.stack([x, 0.5 * x])
    got = torch.vmap(op)(both)
    torch.testing.assert_close(got, torch.stack([op(a) for a in both]))
    got = torch.vmap(torch.func.grad(lambda a: op(a).sum()))(both)
    torch.testing.assert_close(got, torch.stack([gradient(op, a) for a in both]))


def test_a_batch_of_gradients(op, x):
    leaf = x.clone().requires_grad_()
    out = op(leaf)
    every = torch.eye(out.numel(), dtype=out.dtype, device=out.device)
    (got,) = torch.autograd.grad(out, leaf, every, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(out, leaf, u, retain_graph=True)[0] for u in every]
    torch.testing.assert_close(got, torch.stack(want))


def test_second_derivatives(op, x):
    """By another loss of the gradient, as the gradient of it, and by torch.func: none is 0, or
    said not to be there."""
    words = "second"
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(op(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(grad.sum(), leaf, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=words):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match=words):
        torch.func.jacrev(torch.func.grad(lambda a: op(a).square().sum()))(x)


@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "simpo", "orpo", "kl_penalty"])
def test_whole_objectives(loss, backend):
    if backend not in ("cpu", "eager"):
        pytest.skip("nothing here depends on the kernels")
    device = device_of(backend)
    y = TARGETS.reshape(2, 3).to(device)
    ref, weight = REF.reshape(2, 3, D).to(device), WEIGHT.to(device)

    given = {"ref_hidden": ref, "ref_head": weight} if prefkern.LOSSES[loss].needs_reference else {}

    def objective(x, w):
        return prefkern.preference_loss(x, w, y, loss=loss, backend=backend, **given)[0]

    x = HIDDEN.reshape(2, 3, D).to(device)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    want = torch.autograd.grad(objective(*leaves), leaves)
    got = torch.func.grad(objective, argnums=(0, 1))(x, weight)
    torch.testing.assert_close(got, want)
