"""What the record of a call carries beyond weights: low-rank terms, a sparse teacher, given values
without a reference, statistics without gradient, fp32 products of divergences in 16 bits."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP16, FP32, FP64

import prefkern
from prefkern import Head

N, V, D, R = 23, 61, 14, 3
STATS = ("logp", "lse", "ent", "ref_logp", "fkl", "rkl", "jsd:0.3", "alpha:0.4", "tv", "mix:0.2")


def draw(*shape, seed=0, dtype=FP64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=FP64)).to(dtype)


class Case:
    """Policy with two low-rank terms (ranks 2 and 1), reference with one; some rows ignored."""

    def __init__(self, dtype=FP64):
        self.hidden, self.weight = draw(N, D, seed=1, dtype=dtype), draw(V, D, seed=2, dtype=dtype)
        self.u = [draw(N, 2, seed=3, dtype=dtype), draw(N, 1, seed=4, dtype=dtype)]
        self.b = [draw(V, 2, seed=5, dtype=dtype), draw(V, 1, seed=6, dtype=dtype)]
        self.ref_hidden = draw(N, D + 2, seed=7, dtype=dtype)
        self.ref_weight = draw(V, D + 2, seed=8, dtype=dtype)
        self.ref_u, self.ref_b = draw(N, R, seed=9, dtype=dtype), draw(V, R, seed=10, dtype=dtype)
        self.targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(11))
        self.targets[::5] = -100

    def leaves(self, names):
        made = {}
        for name in ("hidden", "weight", "u", "b"):
            value = getattr(self, name)
            several = isinstance(value, list)
            fresh = [
                x.clone().requires_grad_(name in names) for x in (value if several else [value])
            ]
            made[name] = fresh if several else fresh[0]
        return made

    def run(self, backend, names, **options):
        """(stats, gradients) with low-rank terms in the tile."""
        leaf = self.leaves(names)
        head = Head(
            leaf["weight"], low_rank=list(zip(leaf["u"], leaf["b"], strict=True)), softcap=9.0
        )
        ref = Head(self.ref_weight, low_rank=[(self.ref_u, self.ref_b)], temperature=1.2)
        out = prefkern.linear_divergence(
            leaf["hidden"], head, self.targets, self.ref_hidden, ref, stats=STATS, backend=backend,
            **options,
        )  # fmt: skip
        return self.gradients(out, leaf, names)

    def dense(self, names):
        """The same from the sum of weight and low-rank product, in full logits."""
        leaf = self.leaves(names)
        z = leaf["hidden"] @ leaf["weight"].T
        z = z + sum(u @ b.T for u, b in zip(leaf["u"], leaf["b"], strict=True))
        z = 9.0 * torch.tanh(z / 9.0)
        zr = (self.ref_hidden @ self.ref_weight.T + self.ref_u @ self.ref_b.T) / 1.2
        out = prefkern.logits_logps(z, self.targets, ref_logits=zr, stats=STATS, backend="eager")
        return self.gradients(out, leaf, names)

    def gradients(self, out, leaf, names):
        values = [x for x in out if x is not None]
        total = sum((x * draw(N, seed=20 + i, dtype=x.dtype)).sum() for i, x in enumerate(values)
                    if x.requires_grad)  # fmt: skip
        total.backward()
        grads = {}
        for name in names:
            parts = leaf[name] if isinstance(leaf[name], list) else [leaf[name]]
            grads |= {f"{name}{i}": x.grad for i, x in enumerate(parts)}
        return [x.detach() for x in values], grads


WANTED = (
    ("hidden", "weight", "u", "b"), ("hidden", "u", "b"), ("hidden", "u"), ("b",), ("weight", "b"),
)  # fmt: skip


@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
@pytest.mark.parametrize("budget", [0, None])
def test_low_rank_terms_are_the_sum_of_both_products(backend, wanted, budget):
    case = Case()
    values, grads = case.run(backend, wanted, memory_budget=budget)
    want_values, want_grads = case.dense(wanted)
    for a, b in zip(values, want_values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    for name, want in want_grads.items():
        torch.testing.assert_close(grads[name], want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_low_rank_terms_of_a_frozen_head(backend, dtype):
    """logp, entropy and both KLs by the frozen road, against float64 of the same numbers."""
    case = Case(dtype)
    leaf = case.leaves(("hidden", "u"))
    head = Head(leaf["weight"], low_rank=list(zip(leaf["u"], leaf["b"], strict=True)))
    stats = ("logp", "ent", "fkl", "rkl")
    out = prefkern.linear_divergence(
        leaf["hidden"], head, case.targets, case.ref_hidden, case.ref_weight, stats=stats,
        backend=backend,
    )  # fmt: skip
    sum(getattr(out, s).sum() for s in stats).backward()
    wide = [x.detach().double().requires_grad_() for x in (leaf["hidden"], *leaf["u"])]
    z = wide[0] @ case.weight.double().T
    z = z + sum(u @ b.double().T for u, b in zip(wide[1:], case.b, strict=True))
    zr = case.ref_hidden.double() @ case.ref_weight.double().T
    want = prefkern.logits_logps(z, case.targets, ref_logits=zr, stats=stats, backend="eager")
    sum(getattr(want, s).sum() for s in stats).backward()
    bound = {FP32: 2e-5, BF16: 3e-2, FP16: 4e-3}[dtype]
    for got, right in zip((leaf["hidden"], *leaf["u"]), wide, strict=True):
        error = (got.grad.double() - right.grad).norm() / right.grad.norm()
        assert error < bound, float(error)


def test_xent_is_the_cross_entropy_of_a_sparse_teacher(backend):
    case = Case()
    index = torch.stack([torch.randperm(V)[:5] for _ in range(N)])
    q = torch.rand(N, 5, dtype=FP64)
    index[:, 4] = index[:, 0]  # an entry listed twice adds up
    for wanted in (("hidden", "weight"), ("hidden",)):
        leaf = case.leaves(wanted)
        out = prefkern.linear_logps(
            leaf["hidden"], Head(leaf["weight"], softcap=5.0), case.targets,
            stats=("xent", "logp"), values=(index, q), backend=backend,
        )  # fmt: skip
        up = draw(N, seed=30)
        (out.xent * up + out.logp).sum().backward()
        other = case.leaves(wanted)
        z = 5.0 * torch.tanh(other["hidden"] @ other["weight"].T / 5.0)
        lp, live = torch.log_softmax(z, -1), case.targets != -100
        want = torch.where(live, (q * lp.gather(1, index)).sum(1), 0.0)
        logp = torch.where(live, lp.gather(1, case.targets.clamp(min=0)[:, None])[:, 0], 0.0)
        (want * up + logp).sum().backward()
        torch.testing.assert_close(out.xent, want)
        for name in wanted:
            torch.testing.assert_close(leaf[name].grad, other[name].grad)


@pytest.mark.parametrize("sparse", [False, True])
def test_ev_of_given_values_needs_no_reference(backend, sparse):
    case = Case()
    leaf = case.leaves(("hidden", "weight"))
    if sparse:
        index, value = torch.tensor([[3, 7, 3]]).expand(N, 3), torch.rand(N, 3, dtype=FP64)
        values, dense = (index, value), torch.zeros(N, V, dtype=FP64).scatter_add(1, index, value)
    else:
        values = dense = draw(V, seed=12)
    out = prefkern.linear_logps(
        leaf["hidden"], leaf["weight"], case.targets, stats=("ev",), values=values, backend=backend
    )
    out.ev.sum().backward()
    other = case.leaves(("hidden", "weight"))
    p = torch.softmax(other["hidden"] @ other["weight"].T, -1)
    want = torch.where(case.targets != -100, (p * dense).sum(1), 0.0)
    want.sum().backward()
    torch.testing.assert_close(out.ev, want)
    torch.testing.assert_close(leaf["hidden"].grad, other["hidden"].grad)
    torch.testing.assert_close(leaf["weight"].grad, other["weight"].grad)


def test_a_statistic_without_gradient_is_reported_and_not_differentiated(backend):
    case = Case()
    grads = []
    for quiet in ((), ("ent",)):
        leaf = case.leaves(("hidden",))
        out = prefkern.linear_logps(
            leaf["hidden"], leaf["weight"], case.targets, stats=("logp", "ent"),
            no_grad_stats=quiet, backend=backend,
        )  # fmt: skip
        assert out.ent.requires_grad == (not quiet)
        out.logp.sum().backward()
        grads.append(leaf["hidden"].grad)
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="no_grad_stats must be among the call's"):
        prefkern.linear_logps(case.hidden, case.weight, case.targets, no_grad_stats=("ent",))


def test_low_rank_shapes_are_checked():
    case = Case()
    for u, b in ((case.u[0], case.b[1]), (case.u[0][:-1], case.b[0]), (case.u[0], case.b[0][:-1])):
        with pytest.raises(ValueError, match=r"low_rank must hold pairs"):
            prefkern.linear_logps(
                case.hidden, Head(case.weight, low_rank=[(u, b)]), case.targets, backend="eager"
            )
    with pytest.raises(ValueError, match="ref_head must be given"):
        prefkern.linear_divergence(
            case.hidden, Head(case.weight, low_rank=[(case.u[0], case.b[0])]), case.targets,
            case.hidden, backend="eager",
        )  # fmt: skip
