"""What a rank does in test_sharded_heads.py: each statistic of a sharded head beside the whole."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard as Rows
from torch.distributed.tensor import distribute_tensor, init_device_mesh

import prefkern
from prefkern import Head, Shard
from prefkern.backends import tables

FP64 = torch.float64
ONE = ("logp", "lse", "zy", "ent", "col", "top1", "zmean", "xent")
TWO = (
    "logp", "lse", "ent", "col", "top1", "zmean", "ref_logp", "ref_lse", "fkl", "rkl", "jsd:0.3",
    "alpha:0.4", "renyi:0.6", "tv", "bkl:5", "mix:0.25", "ev",
)  # fmt: skip
V, D, DR, R = 53, 12, 9, 2


def draw(*shape, seed, dtype=FP64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=FP64).to(dtype)


def bounds(kind: str, world: int) -> list[int]:
    """First row of every rank and V: even, uneven, with an empty one, tiny ones."""
    if kind == "even":
        return [V * i // world for i in range(world)] + [V]
    if kind == "uneven":
        return [0, *(V - 3 * (world - 1 - i) for i in range(world - 1)), V]
    if kind == "empty":
        return [0, *([V // 2] * (world - 1)), V] if world > 2 else [0, V, V]
    return [0, *range(1, world), V]


class Case:
    """Inputs of all ranks; `n` tokens each where ranks bring their own."""

    def __init__(self, tokens: str, dtype, padded: bool):
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.tokens, self.dtype = tokens, dtype
        counts = [7] if tokens == "same" else [7 - 3 * i for i in range(self.world)]
        if tokens != "same":
            counts[-1] = max(counts[-1], 1)
        n = sum(counts)
        start = 0 if tokens == "same" else sum(counts[: self.rank])
        self.mine = slice(start, start + (7 if tokens == "same" else counts[self.rank]))
        self.hidden, self.ref_hidden = draw(n, D, seed=1), draw(n, DR, seed=2)
        self.weight, self.ref_weight = draw(V, D, seed=3), draw(V, DR, seed=4)
        self.bias = draw(V, seed=5)
        if padded:
            self.bias[-4:] = -torch.inf
        self.u, self.b = draw(n, R, seed=6), draw(V, R, seed=7)
        self.targets = torch.randint(0, V - 4, (n,), generator=torch.Generator().manual_seed(8))
        self.targets[::4] = -100
        if tokens != "same" and self.world > 2:
            self.targets[counts[0] : counts[0] + counts[1]] = -100  # a rank without any
        self.values = draw(V, seed=9)
        index = torch.randint(0, V - 4, (n, 3), generator=torch.Generator().manual_seed(10))
        self.teacher = index, torch.rand(n, 3, generator=torch.Generator().manual_seed(11))
        for name in ("hidden", "ref_hidden", "weight", "ref_weight", "bias", "u", "b"):
            setattr(self, name, getattr(self, name).to(dtype))

    def leaves(self, wanted, rows=slice(None), tokens=slice(None)):
        cut = {"hidden": tokens, "u": tokens, "weight": rows, "bias": rows, "b": rows}
        return {
            name: getattr(self, name)[part].clone().requires_grad_(name in wanted)
            for name, part in cut.items()
        }

    def run(self, leaf, stats, tokens, shard, ref, **options):
        head = Head(leaf["weight"], leaf["bias"], softcap=8.0, low_rank=[(leaf["u"], leaf["b"])],
                    shard=shard)  # fmt: skip
        if "xent" in stats:
            options["values"] = tuple(x[tokens] for x in self.teacher)
        if ref is None:
            out = prefkern.linear_logps(
                leaf["hidden"], head, self.targets[tokens], stats=stats, **options
            )
        else:
            if "ev" in stats:
                options["values"] = self.values
            out = prefkern.linear_divergence(
                leaf["hidden"], head, self.targets[tokens], self.ref_hidden[tokens], ref,
                stats=stats, **options,
            )  # fmt: skip
        return {s: getattr(out, s.partition(":")[0]) for s in stats}

    def total(self, values, tokens):
        """A loss with another weight for every statistic and token."""
        n = self.hidden.shape[0]
        parts = [
            (x * draw(n, seed=20 + i, dtype=x.dtype)[tokens]).sum()
            for i, x in enumerate(values.values())
            if x.requires_grad
        ]
        return sum(parts)


def check(case, kind, stats, wanted, ref_kind, backend, atol, **options):
    """Values and gradients of the local shard against slices of the whole."""
    every = slice(None)
    whole = case.leaves(wanted)
    ref = None if ref_kind == "none" else Head(case.ref_weight, temperature=1.1)
    want = case.run(whole, stats, every, None, ref, backend="eager")
    case.total(want, every).backward()

    cuts = bounds(kind, case.world)
    rows = slice(cuts[case.rank], cuts[case.rank + 1])
    shard = Shard(case.tokens, dist.group.WORLD, rows.start, V)
    leaf = case.leaves(wanted, rows, case.mine)
    if ref_kind == "sharded":
        ref = Head(case.ref_weight[rows], temperature=1.1, shard=shard)
    got = case.run(leaf, stats, case.mine, shard, ref, backend=backend, **options)
    case.total(got, case.mine).backward()
    what = f"{kind} {stats} {wanted} {ref_kind} {case.tokens} {case.dtype} {options}"
    for name, value in got.items():
        torch.testing.assert_close(
            value, want[name][case.mine], rtol=0, atol=atol, equal_nan=True, msg=lambda m: what + m
        )
    mean = case.world if case.tokens == "own" else 1
    for name in wanted:
        part = case.mine if name in ("hidden", "u") else rows
        right = whole[name].grad[part]
        if name not in ("hidden", "u"):
            right = right / mean
        size = float(right.abs().max()) if right.numel() else 1.0
        torch.testing.assert_close(
            leaf[name].grad, right, rtol=0, atol=20 * atol * max(1.0, size),
            msg=lambda m, name=name: f"{what} gradient of {name}: {m}",
        )  # fmt: skip


ALL = ("hidden", "weight", "bias", "u", "b")


def statistics(backend: str) -> None:
    for tokens, kind in itertools.product(
        ("same", "own", "sequence"), ("even", "uneven", "empty", "tiny")
    ):
        case = Case(tokens, FP64, padded=kind == "uneven")
        check(case, kind, ONE, ALL, "none", backend, 1e-12)
        check(case, kind, TWO, ALL, "sharded", backend, 1e-12)
        check(case, kind, ("logp", "fkl"), ALL, "whole", backend, 1e-12, memory_budget=0)
        frozen = ("logp", "ent", "fkl", "rkl", "zy", "lse")
        check(case, kind, frozen, ("hidden", "u"), "sharded", backend, 1e-12)
        check(case, kind, ("logp", "jsd:0.5"), ("hidden",), "whole", backend, 1e-12)
    for dtype, atol in ((torch.float32, 2e-5),):
        for tokens in ("same", "own"):
            case = Case(tokens, dtype, padded=True)
            check(case, "uneven", TWO, ALL, "sharded", backend, atol)


def distributed_tensors(backend: str) -> None:
    """A DTensor head of a tensor-parallel plan, and its gradient as a DTensor."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    hidden, weight = draw(6, D, seed=1).requires_grad_(), draw(V, D, seed=3)
    targets = torch.arange(6) * 7
    head = torch.nn.Parameter(distribute_tensor(weight.clone(), mesh, [Rows(0)]))
    out = prefkern.linear_logps(
        hidden, Head(head, shard=Shard("same")), targets, stats=("logp", "top1"), backend=backend
    )
    out.logp.sum().backward()
    whole, leaf = weight.clone().requires_grad_(), hidden.detach().clone().requires_grad_()
    want = prefkern.linear_logps(leaf, whole, targets, stats=("logp", "top1"), backend="eager")
    want.logp.sum().backward()
    torch.testing.assert_close(out.logp, want.logp)
    torch.testing.assert_close(out.top1, want.top1)
    torch.testing.assert_close(head.grad.full_tensor(), whole.grad)
    torch.testing.assert_close(hidden.grad, leaf.grad)
    for bad in (head, Head):
        try:
            prefkern.linear_logps(hidden, head if bad is head else Head(head), targets)
        except ValueError as error:
            assert "at_head" in str(error) and "tokens='same'" in str(error)
        else:
            raise AssertionError("a DTensor without Shard(tokens=...) was accepted")
    assert rank < world


def compiled(backend: str) -> None:
    """fullgraph, static and dynamic: collectives inside the op, the same bits as eager mode."""
    case = Case("same", torch.float32, padded=False)
    cuts = bounds("even", case.world)
    rows = slice(cuts[case.rank], cuts[case.rank + 1])
    shard = Shard("same", dist.group.WORLD, rows.start, V)
    weight = case.weight[rows].clone().requires_grad_()
    ref = Head(case.ref_weight[rows], shard=shard)

    def step(hidden, weight, targets, ref_hidden):
        head = Head(weight, shard=shard)
        out = prefkern.linear_divergence(
            hidden, head, targets, ref_hidden, ref, stats=("logp", "fkl", "tv"), backend=backend
        )
        return (out.logp + out.fkl + out.tv).sum()

    step(case.hidden, weight, case.targets, case.ref_hidden)  # asks every rank for its rows once
    for dynamic in (False, True):
        torch._dynamo.reset()
        fast = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        grads = []
        for f in (step, fast):
            hidden = case.hidden.clone().requires_grad_()
            loss = f(hidden, weight, case.targets, case.ref_hidden)
            grads.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def tails(backend: str) -> None:
    """Ranks skip by their common masses: where shards end at chunks, the same units as the whole
    head; anywhere else no more than e."""
    world, rank = dist.get_world_size(), dist.get_rank()
    c, e, n = tables.CHUNK, 0.3, 6
    total = 2 * c + 100
    hidden, weight = draw(n, D, seed=1), draw(total, D, seed=2)
    ref_hidden, ref_weight = draw(n, DR, seed=3), draw(total, DR, seed=4)
    targets = torch.tensor([5, -100, c + 9, 2 * c + 50, 7, c + 1])

    def run(rows, shard, mass, name, tokens=slice(None)):
        h, w = hidden[tokens].clone().requires_grad_(), weight[rows].clone().requires_grad_()
        ref = Head(ref_weight[rows], shard=shard)
        out = prefkern.linear_divergence(
            h, Head(w, shard=shard), targets[tokens], ref_hidden[tokens], ref,
            stats=("logp", "fkl"), tail_mass=mass, backend=name,
        )  # fmt: skip
        (out.logp + 0.5 * out.fkl).sum().backward()
        return out, h.grad, w.grad

    exact = run(slice(None), None, 0.0, "eager")
    whole = run(slice(None), None, e, "eager")
    assert (whole[1] - exact[1]).norm() > 1e-2
    for kind, where in (("same", c), ("sequence", c), ("same", 1500), ("same", total)):
        cuts = [0, *[where] * (world - 1), total]
        rows = slice(cuts[rank], cuts[rank + 1])
        shard = Shard(kind, dist.group.WORLD, rows.start, total)
        tokens = (
            slice(None) if kind == "same" else slice(rank * n // world, (rank + 1) * n // world)
        )
        got = run(rows, shard, e, backend, tokens)
        torch.testing.assert_close(got[0].logp, exact[0].logp[tokens])
        if where != 1500:
            torch.testing.assert_close(got[0].active, whole[0].active[tokens])
            torch.testing.assert_close(got[1], whole[1][tokens], rtol=0, atol=1e-12)
            torch.testing.assert_close(got[2], whole[2][rows], rtol=0, atol=1e-12)
        else:
            lacks = (got[1] - exact[1]).abs().sum(1)
            assert (lacks <= 1.0 * e * 2.0 * weight.abs().amax() * D).all()
            assert 0 < got[0].active[0] < 1


def refusals(backend: str) -> None:
    """Shards that overlap or disagree end every rank with the same words; rows that do not fit end
    the rank that has them, before it meets the others."""
    world, rank = dist.get_world_size(), dist.get_rank()
    hidden, targets, rows = draw(4, D, seed=1), torch.arange(4), V // world
    for start, total in ((1 - rank, V), (rank * rows + 1, V), (rank * rows, V + rank)):
        try:
            Shard("same", dist.group.WORLD, start, total)
        except ValueError as error:
            assert "shards of a head must" in str(error)
        else:
            raise AssertionError("shards that do not fit were accepted")
    shard = Shard("same", dist.group.WORLD, rank * rows, V)
    for weight in (draw(rows + 2, D, seed=2), draw(rows - 1, D, seed=2)):
        try:
            prefkern.linear_logps(hidden, Head(weight, shard=shard), targets, backend=backend)
        except ValueError as error:
            assert "must hold the same rows" in str(error)
        else:
            raise AssertionError("a head of other rows than its shard was accepted")
