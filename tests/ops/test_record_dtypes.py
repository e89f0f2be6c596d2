"""What the record of a call carries, in the dtypes that GPU kernels compute in: against float64 of
the same numbers (test_record.py asks for exactness, in float64)."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP16, FP32, FP64

import prefkern
from prefkern import Head

N, V, D, R, K = 23, 301, 14, 3, 5
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=lambda d: str(d)[6:])
BOUND = {FP32: 3e-6, BF16: 2e-2, FP16: 3e-3}


def draw(*shape, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=FP64).to(dtype)


class Case:
    """Inputs that both dtypes hold exactly; `wide` computes in float64."""

    def __init__(self, dtype, *, wide=False):
        def made(*shape, seed, grad=False):
            x = draw(*shape, seed=seed, dtype=dtype)
            return (x.double() if wide else x).requires_grad_(grad)

        self.hidden, self.u = made(N, D, seed=1, grad=True), made(N, R, seed=2, grad=True)
        self.weight, self.b = made(V, D, seed=3, grad=True), made(V, R, seed=4, grad=True)
        self.bias = made(V, seed=5, grad=True)
        self.ref_hidden, self.ref_weight = made(N, D + 2, seed=6), made(V, D + 2, seed=7)
        self.aux_hidden, self.aux_weight = made(N, R, seed=8), made(V, R, seed=9)
        self.aux_bias = made(V, seed=10)
        g = torch.Generator().manual_seed(11)
        self.targets = torch.randint(0, V, (N,), generator=g)
        self.targets[::5] = -100
        self.index = torch.randint(0, V, (N, K), generator=g)
        self.index[:, 4] = self.index[:, 0]  # an entry listed twice adds up
        self.q = torch.rand(N, K, generator=g)

    def backward(self, out):
        total = 0.0
        for i, x in enumerate(x for x in out if x is not None):
            if x.requires_grad:
                total = total + (x * draw(N, seed=20 + i, dtype=x.dtype)).sum()
        total.backward()
        leaves = (self.hidden, self.u, self.weight, self.b, self.bias)
        return [x.detach() for x in out if x is not None], [x.grad for x in leaves]


def compare(run, backend, dtype):
    """run(case, backend) in the dtype, and by eager PyTorch in float64."""
    case, truth = Case(dtype), Case(dtype, wide=True)
    values, grads = case.backward(run(case, backend))
    want, right = truth.backward(run(truth, "eager"))
    for got, true in zip(values, want, strict=True):
        error = (got.double() - true).norm() / true.norm()
        assert error < BOUND[dtype], f"value: {error:.2e}"
    assert [g is None for g in grads] == [g is None for g in right]
    for got, true in zip(grads, right, strict=True):
        if got is not None:
            error = (got.double() - true).norm() / true.norm()
            assert error < 2 * BOUND[dtype], f"gradient: {error:.2e}"


@DTYPES
@pytest.mark.parametrize("stats", ["logp", "logp,ent,fkl,tv"])
def test_low_rank_terms(backend, stats, dtype):
    def run(case, where):
        head = Head(case.weight, case.bias, low_rank=[(case.u, case.b)], softcap=20.0)
        names = stats.split(",")
        if len(names) == 1:
            return prefkern.linear_logps(
                case.hidden, head, case.targets, stats=names, backend=where
            )
        return prefkern.linear_divergence(
            case.hidden, head, case.targets, case.ref_hidden, case.ref_weight, stats=names,
            backend=where,
        )  # fmt: skip

    compare(run, backend, dtype)


@DTYPES
@pytest.mark.parametrize("stats", ["xent", "xent,logp,ent", "ev"])
def test_sparse_values_of_one_model(backend, stats, dtype):
    def run(case, where):
        head = Head(case.weight, case.bias, scale=0.7, softcap=5.0)
        return prefkern.linear_logps(
            case.hidden, head, case.targets, stats=stats.split(","), values=(case.index, case.q),
            backend=where,
        )  # fmt: skip

    compare(run, backend, dtype)


@DTYPES
@pytest.mark.parametrize("stats", ["ev", "ev,xent,rkl"])
def test_a_third_head_with_options_of_its_own(backend, stats, dtype):
    def run(case, where):
        aux = Head(case.aux_weight, case.aux_bias, softcap=6.0, scale=1.3, temperature=0.8)
        values = (case.index, case.q) if "xent" in stats else None
        return prefkern.linear_divergence(
            case.hidden, case.weight, case.targets, case.ref_hidden, case.ref_weight,
            aux_hidden=case.aux_hidden, aux_head=aux, values=values, stats=stats.split(","),
            backend=where,
        )  # fmt: skip

    compare(run, backend, dtype)
