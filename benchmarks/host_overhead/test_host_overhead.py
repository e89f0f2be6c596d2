"""Host overhead: calls so small that time is Python, dispatch and autograd, not arithmetic.

`pytest benchmarks/host_overhead --benchmark-only`. Each call is also made of plain torch operators
(the rows [torch]).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern
from prefkern.backends import choice
from prefkern.backends.contract import Problem

torch.set_num_threads(1)
N, D, V, S = 16, 8, 32, 4
_PLAIN = Problem(
    op="linear_logps", device="cpu", dtype=torch.float32, stats=("logp",), N=N, V=V, D=D
)
BACKENDS = [name for name in choice.backend_names() if not choice.unsupported(name, _PLAIN)]


class Inputs:
    """Leaves and constants; what a call returns must be finite."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.h = torch.randn(N, D, generator=g, requires_grad=True)
        self.w = torch.randn(V, D, generator=g, requires_grad=True)
        self.y = torch.randint(0, V, (N,), generator=g)
        self.reference = self.h.detach() + 0.1
        self.cu_seqlens = torch.arange(S + 1, dtype=torch.int32) * (N // S)
        self.ones = torch.ones(N)

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.h, self.w, self.y


def logps(x: Inputs, h: Tensor) -> Tensor:
    return -F.cross_entropy(h @ x.w.T, x.y, reduction="none")


def logps_and_kl(x: Inputs) -> Tensor:
    lp = (x.h @ x.w.T).log_softmax(-1)
    with torch.no_grad():
        lr = (x.reference @ x.w.T).log_softmax(-1)
    return (lp.gather(1, x.y[:, None])[:, 0] + (lr.exp() * (lr - lp)).sum(-1)).sum()


def dpo(x: Inputs) -> Tensor:
    """No metrics."""
    with torch.no_grad():
        ref_logp = logps(x, x.reference)
    chosen, rejected = (logps(x, x.h) - ref_logp).view(S // 2, 2, -1).sum(-1).unbind(1)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def preference(loss: str) -> Callable[[Inputs, str], Tensor]:
    """The whole objective with its metrics."""
    return lambda x, b: prefkern.preference_loss(
        *x.head, x.cu_seqlens, loss=loss, ref_hidden=x.reference, backend=b
    )[0]


def divergence(x: Inputs, backend: str) -> Tensor:
    found = prefkern.linear_divergence(*x.head, x.reference, backend=backend)
    return (found.logp + found.fkl).sum()


# name -> (ours, in torch operators or None, with its backward)
CALLS = {
    "linear_logps": (lambda x, b: prefkern.linear_logps(*x.head, backend=b).logp,
                     lambda x: logps(x, x.h), False),
    "linear_logps_backward": (lambda x, b: prefkern.linear_logps(*x.head, backend=b).logp.sum(),
                              lambda x: logps(x, x.h).sum(), True),
    "linear_divergence_backward": (divergence, logps_and_kl, True),
    "segment_sum": (lambda x, b: prefkern.segment_sum(x.ones, x.cu_seqlens, backend=b),
                    lambda x: x.ones.view(S, -1).double().sum(1), False),
    "preference_loss_dpo": (preference("dpo"), dpo, True),
    "preference_loss_tdpo2": (preference("tdpo2"), None, True),
}  # fmt: skip


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_call(benchmark, name, backend):
    ours, plain, backward = CALLS[name]
    if backend == "torch" and plain is None:
        pytest.skip("dpo's row stands for it")
    x = Inputs()

    def call() -> Tensor:
        with torch.set_grad_enabled(backward):
            value = plain(x) if backend == "torch" else ours(x, backend)
        if backward:
            value.backward()
        return value

    assert torch.isfinite(benchmark(call)).all()
    assert not backward or torch.isfinite(x.h.grad).all()
