"""What a rank does in test_sharded_heads.py: each statistic of a sharded head beside the whole."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from closeness import eps
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sharded_cases import ALL, DR, FP64, LEFT, ONE, TWO, Case, D, V, bounds, check, draw
from torch.distributed.tensor import Shard as Rows
from torch.distributed.tensor import distribute_tensor, init_device_mesh

import prefkern
from prefkern import Head, Shard
from prefkern.backends import tables
from prefkern.ops import sharded

KINDS = list(itertools.product(("same", "own", "sequence"), ("even", "uneven", "empty", "tiny")))
# the interpreter takes minutes for all: these cover the driver
INTERPRETED = [("same", "uneven"), ("own", "empty"), ("sequence", "tiny")]


def statistics(backend: str) -> None:
    """In fp64 to rounding: trainable and frozen, the reference sharded alike or whole, with logits
    kept, kept in part and recomputed."""
    for tokens, kind in INTERPRETED if backend == "triton" else KINDS:
        case = Case(tokens, FP64, padded=kind == "uneven")
        check(case, kind, ONE, ALL, "none", backend, 1e-12)
        check(case, kind, TWO, ALL, "sharded", backend, 1e-12)
        budget = {"even": 0, "tiny": 3 * 8 * V}.get(kind)
        check(case, kind, ("logp", "fkl"), ALL, "whole", backend, 1e-12, memory_budget=budget)
        frozen = ("logp", "ent", "fkl", "rkl", "zy", "lse")
        check(case, kind, frozen, LEFT, "sharded", backend, 1e-12)
        check(case, kind, ("logp", "jsd:0.5"), ("hidden",), "whole", backend, 1e-12)


def kept_logits(backend: str) -> None:
    """Under a budget that has room, every row's logits are kept, those of other ranks' tokens too;
    under a smaller one as many as fit. None is computed twice."""
    for tokens in ("same", "own"):
        case, cuts = Case(tokens, FP64, padded=False), bounds("even", dist.get_world_size())
        rows = cuts[case.rank + 1] - cuts[case.rank]
        for budget, want in ((None, case.hidden.shape[0]), (3 * 8 * rows, 3), (0, 0)):
            fold, seen = sharded._fold, []

            def note(module, own, kept, fold=fold, seen=seen):
                seen.append(kept)
                return fold(module, own, kept)

            sharded._fold = note
            try:
                case.sharded(cuts, ("logp",), ALL, "none", backend=backend, memory_budget=budget)
            finally:
                sharded._fold = fold
            scored = int((case.targets != -100).sum())
            assert min(seen[0], scored) == min(want, scored), (tokens, budget, seen)


def values_of_ev(backend: str) -> None:
    """A of `ev` from a third head, sharded and whole, and from single columns."""
    for tokens, kind in (("same", "uneven"), ("own", "empty")):
        case = Case(tokens, FP64, padded=True)
        check(case, kind, ("logp", "ev"), ALL, "none", backend, 1e-12)
        check(case, kind, ("logp", "ev"), ALL, "none", backend, 1e-12, sparse=True)
        check(case, kind, ("fkl", "ev"), ALL, "sharded", backend, 1e-12, aux=True)
        check(case, kind, ("fkl", "ev"), LEFT, "whole", backend, 1e-12, aux=True)


def padding(backend: str) -> None:
    """A rank whose every column is padding (-inf), policy and reference."""
    for tokens in ("same", "own"):
        case = Case(tokens, FP64, padded=True)
        check(case, "padding", ONE, ALL, "none", backend, 1e-12)
        check(case, "padding", TWO, ALL, "sharded", backend, 1e-12)


def ties(backend: str) -> None:
    """Of equal largest logits on two ranks the lower column counts, wherever the cut is."""
    world, rank, n = dist.get_world_size(), dist.get_rank(), 5
    # whole numbers: the same logit on every rank, whatever order its products are summed in
    hidden, weight = draw(n, D, seed=1).sign(), draw(V, D, seed=2).sign()
    for first, second in ((1, V - 1), (V // 2 - 1, V - 2), (V - 3, V - 1)):
        tied = torch.cat([weight, hidden])  # row V + i is the largest logit of token i, which is D
        tied[first] = tied[second] = 2 * hidden[0]
        tied[V:][0] = 0
        for cut in (second, first + 1, V + 2, V + n - 1):
            cuts = [0, *[cut] * (world - 1), V + n]
            shard = Shard("same", dist.group.WORLD, cuts[rank], V + n)
            head = Head(tied[cuts[rank] : cuts[rank + 1]], shard=shard)
            for target, right in ((first, 1.0), (second, 0.0), (V, 0.0)):
                targets = torch.full((n,), target)
                call = {"stats": "top1", "backend": backend}
                got = prefkern.linear_logps(hidden, head, targets, **call).top1
                assert got[0] == right, (first, second, cut, target)
                want = prefkern.linear_logps(hidden, tied, targets, stats="top1", backend="eager")
                assert torch.equal(got, want.top1), (first, second, cut, target)


def narrow(backend: str) -> None:
    """fp32, bf16 and fp16: no further from the truth than twice the whole head is, and a floor of
    one rounding more (partial gradients are rounded before they are summed)."""
    for dtype, tokens in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ("same", "own")
    ):
        case, cuts = Case(tokens, dtype, padded=True), bounds("uneven", dist.get_world_size())
        for stats, wanted, ref in ((ONE, ALL, "none"), (TWO, ALL, "sharded"),
                                   (("logp", "fkl"), LEFT, "sharded")):  # fmt: skip
            truth, true_grads = case.whole(stats, wanted, ref, dtype=FP64, backend="eager")
            whole, grads = case.whole(stats, wanted, ref, backend=backend)
            got, found = case.sharded(cuts, stats, wanted, ref, backend=backend)
            pairs = [
                (n, got[n], whole[n][case.mine], truth[n][case.mine], torch.float32)
                for n in stats
                if n != "top1"  # the columns of two logits that round alike
            ]
            pairs += [
                (n, found[n], *(case.mine_of(n, g[n], cuts) for g in (grads, true_grads)), dtype)
                for n in wanted
            ]
            for name, value, beside, right, unit in pairs:
                size = max(1.0, float(right.abs().max()) if right.numel() else 0.0)
                error, allowed = (float((x.double() - right).norm()) for x in (value, beside))
                floor = 8 * eps(unit) * size * max(1, right.numel()) ** 0.5
                assert error <= 2 * allowed + floor, (dtype, tokens, stats, name, error, allowed)


@given(
    sizes=st.lists(st.integers(0, V), min_size=8, max_size=8),
    tokens=st.sampled_from(("same", "own", "sequence")),
    padded=st.booleans(),
    stats=st.sets(st.sampled_from(TWO), min_size=1),
    wanted=st.sets(st.sampled_from(ALL), min_size=1),
    ref=st.sampled_from(("whole", "sharded")),
    rows=st.integers(0, 8),
)
# every rank draws the same examples; a failing one is not shrunk, since a rank cannot alone
@settings(max_examples=25, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
def _any_sizes(backend, sizes, tokens, padded, stats, wanted, ref, rows):
    world = dist.get_world_size()
    cuts = [0, *sorted(sizes[: world - 1]), V]
    stats = sorted(stats | {"logp"})
    check(
        Case(tokens, FP64, padded), cuts, tuple(stats), tuple(sorted(wanted)), ref, backend, 1e-12,
        memory_budget=rows * 8 * V,
    )  # fmt: skip


def sizes(backend: str) -> None:
    """Any sizes of shards, statistics, leaves and budgets."""
    _any_sizes(backend)


def distributed_tensors(backend: str) -> None:
    """A DTensor head of a tensor-parallel plan with its adapter, and gradients as DTensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, weight = draw(6, D, seed=1).requires_grad_(), draw(V, D, seed=3)
    u, b = draw(6, 2, seed=4), draw(V, 2, seed=5)
    targets = torch.arange(6) * 7
    head, right = (
        torch.nn.Parameter(distribute_tensor(x.clone(), mesh, [Rows(0)])) for x in (weight, b)
    )
    stats = ("logp", "top1")
    out = prefkern.linear_logps(
        hidden, Head(head, low_rank=[(u, right)], shard=Shard("same")), targets, stats=stats,
        backend=backend,
    )  # fmt: skip
    out.logp.sum().backward()
    whole, leaf, term = (x.detach().clone().requires_grad_() for x in (weight, hidden, b))
    want = prefkern.linear_logps(
        leaf, Head(whole, low_rank=[(u, term)]), targets, stats=stats, backend="eager"
    )
    want.logp.sum().backward()
    torch.testing.assert_close(out.logp, want.logp)
    torch.testing.assert_close(out.top1, want.top1)
    torch.testing.assert_close(head.grad.full_tensor(), whole.grad)
    torch.testing.assert_close(right.grad.full_tensor(), term.grad)
    torch.testing.assert_close(hidden.grad, leaf.grad)


def compiled(backend: str) -> None:
    """fullgraph, static and dynamic: collectives inside the op, the same bits as eager mode."""
    kinds = {"cpu": ("same", "sequence"), "eager": ("own",), "triton": ("same",)}
    for tokens in kinds.get(backend, ("same",)):
        _compiled(backend, tokens)


def _compiled(backend: str, tokens: str) -> None:
    case = Case("same", torch.float32, padded=False)  # as many tokens on every rank
    cuts = bounds("even", case.world)
    rows = slice(cuts[case.rank], cuts[case.rank + 1])
    shard = Shard(tokens, dist.group.WORLD, rows.start, V)
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
    places = (("same", c), ("sequence", c), ("own", c), ("same", 1500), ("same", total))
    for kind, where in places:
        cuts = [0, *[where] * (world - 1), total]
        rows = slice(cuts[rank], cuts[rank + 1])
        shard = Shard(kind, dist.group.WORLD, rows.start, total)
        tokens = (
            slice(None) if kind == "same" else slice(rank * n // world, (rank + 1) * n // world)
        )
        got = run(rows, shard, e, backend, tokens)
        torch.testing.assert_close(got[0].logp, exact[0].logp[tokens])
        if where != 1500:
            mean = world if kind == "own" else 1
            torch.testing.assert_close(got[0].active, whole[0].active[tokens])
            torch.testing.assert_close(got[1], whole[1][tokens], rtol=0, atol=1e-12)
            torch.testing.assert_close(got[2], whole[2][rows] / mean, rtol=0, atol=1e-12)
        else:
            lacks = (got[1] - exact[1]).abs().sum(1)
            assert (lacks <= 1.0 * e * 2.0 * weight.abs().amax() * D).all()
            assert 0 < got[0].active[0] < 1


def refusals() -> None:
    """Shards that overlap or disagree end every rank with the same words; rows that do not fit end
    the rank that has them, before it meets the others."""
    world, rank = dist.get_world_size(), dist.get_rank()
    hidden, targets, rows = draw(4, D, seed=1), torch.arange(4), V // world

    def refused(text, call):
        try:
            call()
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"accepted, and not refused with {text!r}")

    for start, total in ((1 - rank, V), (rank * rows + 1, V), (rank * rows, V + rank)):
        refused(
            "shards of a head must",
            lambda start=start, total=total: Shard("same", dist.group.WORLD, start, total),
        )
    shard = Shard("same", dist.group.WORLD, rank * rows, V)
    for weight in (draw(rows + 2, D, seed=2), draw(rows - 1, D, seed=2)):
        refused(
            "must hold the same rows",
            lambda w=weight: prefkern.linear_logps(hidden, Head(w, shard=shard), targets),
        )
    cuts = [*(i * rows for i in range(world)), V]
    part = Head(draw(V, D, seed=3)[cuts[rank] : cuts[rank + 1]], shard=shard)
    whole = draw(V, D, seed=2).requires_grad_()
    refused(
        "must be sharded too where it trains",
        lambda: prefkern.linear_divergence(hidden, whole, targets, hidden, part),
    )
    alone = prefkern.linear_divergence(hidden, whole.detach(), targets, hidden, part)
    full = prefkern.linear_divergence(hidden, whole.detach(), targets, hidden, draw(V, D, seed=3))
    torch.testing.assert_close(alone.fkl, full.fkl)

    mesh = init_device_mesh("cpu", (world,))
    linear = torch.nn.Linear(D, V, bias=False, dtype=FP64)
    linear.weight = torch.nn.Parameter(distribute_tensor(draw(V, D, seed=3), mesh, [Rows(0)]))
    for bad in (linear.weight, linear, Head):
        head = (lambda: Head(linear.weight)) if bad is Head else (lambda bad=bad: bad)
        for ways in ("at_head", "tokens='same'"):
            refused(ways, lambda head=head: prefkern.linear_logps(hidden, head(), targets))
            refused(
                ways,
                lambda head=head: prefkern.preference_loss(hidden[None], head(), targets[None]),
            )
