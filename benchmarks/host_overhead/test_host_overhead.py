"""Host overhead: calls so small that time is Python, dispatch and autograd, not arithmetic.

`pytest benchmarks/host_overhead --benchmark-only`. The rows named torch_* do the same with plain
torch operators.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import prefkern
from prefkern.backends import choice
from prefkern.backends.contract import Problem

torch.set_num_threads(1)
N, D, V, S = 16, 8, 32, 4

_PLAIN = Problem(
    op="linear_logps", device="cpu", dtype=torch.float32, stats=("logp",), N=N, V=V, D=D
)
BACKENDS = [name for name in choice.backend_names() if not choice.unsupported(name, _PLAIN)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def head():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g, requires_grad=True)
    weight = torch.randn(V, D, generator=g, requires_grad=True)
    targets = torch.randint(0, V, (N,), generator=g)
    return hidden, weight, targets


@pytest.fixture
def cu_seqlens():
    return torch.arange(S + 1, dtype=torch.int32) * (N // S)


@each_backend
def test_linear_logps(benchmark, head, backend):
    def call():
        with torch.no_grad():
            return prefkern.linear_logps(*head, backend=backend).logp

    assert torch.isfinite(benchmark(call)).all()


def test_torch_linear_logps(benchmark, head):
    hidden, weight, targets = head

    def call():
        with torch.no_grad():
            return -F.cross_entropy(hidden @ weight.T, targets, reduction="none")

    assert torch.isfinite(benchmark(call)).all()


@each_backend
def test_linear_logps_backward(benchmark, head, backend):
    benchmark(lambda: prefkern.linear_logps(*head, backend=backend).logp.sum().backward())
    assert torch.isfinite(head[0].grad).all()


def test_torch_linear_logps_backward(benchmark, head):
    hidden, weight, targets = head
    benchmark(lambda: F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward())
    assert torch.isfinite(hidden.grad).all()


@each_backend
def test_linear_divergence_backward(benchmark, head, backend):
    hidden, weight, targets = head
    reference = hidden.detach() + 0.1

    def call():
        found = prefkern.linear_divergence(hidden, weight, targets, reference, backend=backend)
        (found.logp + found.fkl).sum().backward()

    benchmark(call)
    assert torch.isfinite(hidden.grad).all()


def test_torch_linear_divergence_backward(benchmark, head):
    hidden, weight, targets = head
    reference = hidden.detach() + 0.1

    def call():
        lp = (hidden @ weight.T).log_softmax(-1)
        with torch.no_grad():
            lr = (reference @ weight.T).log_softmax(-1)
        fkl = (lr.exp() * (lr - lp)).sum(-1)
        (lp.gather(1, targets[:, None])[:, 0] + fkl).sum().backward()

    benchmark(call)
    assert torch.isfinite(hidden.grad).all()


@each_backend
def test_segment_sum(benchmark, cu_seqlens, backend):
    values = torch.ones(N)
    sums = benchmark(lambda: prefkern.segment_sum(values, cu_seqlens, backend=backend))
    assert sums.sum() == N


def test_torch_segment_sum(benchmark):
    values = torch.ones(N)
    sums = benchmark(lambda: values.view(S, -1).double().sum(1))
    assert sums.sum() == N


@each_backend
@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_preference_loss(benchmark, head, cu_seqlens, backend, loss):
    """The whole objective with its metrics and backward."""
    hidden, weight, targets = head
    reference = hidden.detach() + 0.1

    def call():
        value, _ = prefkern.preference_loss(
            hidden, weight, targets, cu_seqlens, loss=loss, ref_hidden=reference, backend=backend
        )
        value.backward()
        return value

    assert torch.isfinite(benchmark(call))


def test_torch_preference_loss(benchmark, head):
    """DPO alone, no metrics."""
    hidden, weight, targets = head
    reference = hidden.detach() + 0.1

    def call():
        logp = -F.cross_entropy(hidden @ weight.T, targets, reduction="none")
        with torch.no_grad():
            ref_logp = -F.cross_entropy(reference @ weight.T, targets, reduction="none")
        chosen, rejected = (logp - ref_logp).view(S // 2, 2, -1).sum(-1).unbind(1)
        value = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        value.backward()
        return value

    assert torch.isfinite(benchmark(call))
