"""tail_mass: which units a backward computes, what a gradient then lacks, and what the head gets.

With the identity as its head, the gradient of a hidden state is the row of dz itself.
"""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP16, FP32, FP64

import prefkern
from prefkern import Head
from prefkern.backends import tables

C = tables.CHUNK
V = 2 * C + 200  # the last chunk is short
N = 6
CHUNKS = 3


def draw(*shape, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=g, dtype=FP64)


def logits(kind: str, seed: int = 0) -> torch.Tensor:  # [N, V]
    z = draw(N, V, seed=seed)
    if kind == "peaked":
        z = 6.0 * z
    elif kind == "flat":
        z = 1e-3 * z
    elif kind == "padded":
        z[:, 2 * C - 50 :] = -torch.inf
        z[:, :5] += 9.0
    elif kind == "adversarial":  # every chunk but the first holds a mass just under e = 2^-8
        z = z[:, :1].expand(N, V).clone() - 60.0
        z[:, 3] = 0.0
        z[:, [C + 7, 2 * C + 7]] = torch.log(torch.tensor(0.999 * 2.0**-8, dtype=FP64))
    return z


def labels(seed: int = 0) -> torch.Tensor:
    y = torch.randint(0, 2 * C - 50, (N,), generator=torch.Generator().manual_seed(seed))
    y[3] = -100
    return y


def chunk_masses(z: torch.Tensor) -> torch.Tensor:  # [CHUNKS, N]
    p = z.softmax(1)
    return torch.stack([part.sum(1) for part in p.split(C, 1)])


KINDS = ("random", "peaked", "flat", "padded", "adversarial")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("e", [2.0**-8, 0.4])
def test_what_a_row_of_the_gradient_lacks(backend, kind, e):
    z, zr, y = logits(kind), logits(kind, seed=1), labels()
    index = torch.stack([torch.randperm(2 * C - 50)[:3] for _ in range(N)])
    teacher = torch.rand(N, 3, dtype=FP64)
    eye = torch.eye(V, dtype=FP64)
    bias = torch.where(z[0] == -torch.inf, -torch.inf, 0.0)  # columns that are masked in all rows
    inputs = [torch.where(x == -torch.inf, 0.0, x) for x in (z, zr)]
    bounds = {"logp": 1.0, "lse": 1.0, "zy": 0.0, "xent": teacher.sum(1), "fkl": 2.0}
    for stat, per_mass in bounds.items():
        values = (index, teacher) if stat == "xent" else None
        rows = {}
        for tail_mass in (0.0, e):
            hidden = inputs[0].clone().requires_grad_()
            out = prefkern.linear_divergence(
                hidden, Head(eye, bias=bias), y, inputs[1], Head(eye, bias=bias), values=values,
                stats=(stat,), tail_mass=tail_mass, backend=backend,
            )  # fmt: skip
            getattr(out, stat).sum().backward()
            rows[tail_mass] = hidden.grad
        lacks = (rows[e] - rows[0.0]).abs().sum(1)
        assert (lacks <= per_mass * e * (1 + 1e-6) + 1e-13).all(), (stat, lacks)
        computed = torch.stack([(part != 0).any(1) for part in rows[e].split(C, 1)])
        live = y != -100
        assert computed[y[live] // C, live.nonzero()[:, 0]].all()  # the target's own
        untouched = rows[e].split(C, 1), rows[0.0].split(C, 1)
        for got, whole, on in zip(*untouched, computed, strict=True):
            torch.testing.assert_close(got[on], whole[on], rtol=1e-12, atol=1e-15)
        assert out.active is not None and (out.active[3] == 0) and (out.active[live] > 0).all()


def test_as_many_units_are_skipped_as_the_mass_allows(backend):
    """Of the units beside the target's, the smallest whose masses add up to at most e."""
    z, y, e = logits("peaked"), labels(), 0.3
    hidden = z.clone().requires_grad_()
    head = Head(torch.eye(V, dtype=FP64))
    out = prefkern.linear_logps(hidden, head, y, tail_mass=e, backend=backend)
    out.logp.sum().backward()
    masses = chunk_masses(z)
    for row in (y != -100).nonzero()[:, 0].tolist():
        free = [c for c in range(CHUNKS) if c != int(y[row]) // C]
        left = {c for c in free if not hidden.grad[row].split(C)[c].any()}
        total, want = 0.0, set()
        for c in sorted(free, key=lambda c: float(masses[c, row])):
            total += float(masses[c, row])
            if total > e:
                break
            want.add(c)
        assert left == want
        assert float(out.active[row]) == pytest.approx(1 - len(want) / CHUNKS)


def test_mass_just_under_e_in_every_chunk_is_left_out_once(backend):
    """Two chunks hold 0.999 e each: one of them may go, not both."""
    hidden = logits("adversarial").requires_grad_()
    y = torch.full((N,), 3)
    head = Head(torch.eye(V, dtype=FP64))
    out = prefkern.linear_logps(hidden, head, y, tail_mass=2.0**-8, backend=backend)
    out.logp.sum().backward()
    assert out.active.tolist() == pytest.approx([2 / 3] * N)


def test_all_the_mass_leaves_the_target_chunk_alone(backend):
    hidden = logits("random").requires_grad_()
    y = labels()
    head = Head(torch.eye(V, dtype=FP64))
    out = prefkern.linear_logps(hidden, head, y, tail_mass=1.0, backend=backend)
    out.logp.sum().backward()
    for row in (y != -100).nonzero()[:, 0].tolist():
        on = [bool(part.any()) for part in hidden.grad[row].split(C)]
        assert on == [c == int(y[row]) // C for c in range(CHUNKS)]
        assert float(out.active[row]) == 1 / CHUNKS


class Case:
    """A head with everything: bias, soft cap, low-rank terms, and a reference."""

    def __init__(self, dtype=FP64, scale=1.5):
        d, r = 12, 3
        self.hidden, self.weight = draw(N, d, seed=1, scale=scale), draw(V, d, seed=2)
        self.u, self.b, self.bias = draw(N, r, seed=3), draw(V, r, seed=4), draw(V, seed=5)
        self.ref_hidden, self.ref_weight = draw(N, 7, seed=6), draw(V, 7, seed=7)
        names = ("hidden", "weight", "u", "b", "bias", "ref_hidden", "ref_weight")
        for name in names:
            setattr(self, name, getattr(self, name).to(dtype))
        self.y = labels()
        self.hidden[3] = torch.nan  # an ignored row

    def run(self, backend, tail_mass, needed=("hidden", "weight", "u", "b", "bias"), **options):
        leaf = {
            name: getattr(self, name).clone().requires_grad_(name in needed)
            for name in ("hidden", "weight", "u", "b", "bias")
        }
        head = Head(leaf["weight"], bias=leaf["bias"], low_rank=[(leaf["u"], leaf["b"])])
        out = prefkern.linear_divergence(
            leaf["hidden"], head, self.y, self.ref_hidden, self.ref_weight,
            stats=("logp", "fkl", "ent"), no_grad_stats=("ent",), tail_mass=tail_mass,
            backend=backend, **options,
        )  # fmt: skip
        (out.logp.sum() - 0.4 * out.fkl.sum()).backward()
        return out, {name: leaf[name].grad for name in needed}


@pytest.mark.parametrize(
    "needed", [("hidden", "weight", "u", "b", "bias"), ("hidden", "u", "b"), ("hidden",), ("bias",)]
)
def test_the_head_gets_the_skipped_mass_evenly(backend, needed):
    """Against the same arithmetic in full logits: dz with skipped units set to 0 for dH, to their
    mean for the head."""
    case, e = Case(), 0.2
    out, grads = case.run(backend, e, needed)
    exact_out, exact = case.run(backend, 0.0, needed)
    torch.testing.assert_close(out.logp, exact_out.logp, rtol=0, atol=0)
    live = case.y != -100
    hidden = torch.where(live[:, None], case.hidden, 0.0)
    z = hidden @ case.weight.T + case.u @ case.b.T + case.bias
    p, r = z.softmax(1), (case.ref_hidden @ case.ref_weight.T).softmax(1)
    dz = -p - 0.4 * (p - r)
    dz[torch.arange(N), case.y.clamp(min=0)] += 1.0
    dz[~live] = 0.0
    masses = torch.maximum(chunk_masses(z), chunk_masses(case.ref_hidden @ case.ref_weight.T))
    masses[case.y.clamp(min=0) // C, torch.arange(N)] = torch.inf
    ordered, order = masses.sort(0)
    skipped = torch.zeros_like(masses, dtype=torch.bool)
    skipped.scatter_(0, order, ordered.cumsum(0) <= e)
    assert 0.1 < skipped[:, live].float().mean() < 0.8  # the case is one
    columns = skipped.T.repeat_interleave(C, 1)[:, :V]
    left_out = torch.where(columns, 0.0, dz)
    means = torch.cat([x.mean(1, keepdim=True).expand_as(x) for x in dz.split(C, 1)], 1)
    spread = torch.where(columns, means, dz)
    want = {
        "hidden": left_out @ case.weight, "u": left_out @ case.b, "weight": spread.T @ hidden,
        "b": spread.T @ case.u, "bias": spread.sum(0),
    }  # fmt: skip
    for name in needed:
        torch.testing.assert_close(grads[name], want[name], rtol=1e-9, atol=1e-11)
        assert not torch.equal(grads[name], exact[name])
    torch.testing.assert_close(out.active[live], 1 - skipped[:, live].double().mean(0))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_16_bits_err_by_rounding_and_e_alone(backend, dtype):
    case = Case(dtype)
    wide = Case()
    for name in ("hidden", "weight", "u", "b", "bias", "ref_hidden", "ref_weight"):
        setattr(wide, name, getattr(case, name).double())
    wanted = ("hidden", "weight")
    _, right = wide.run("eager", 2.0**-4, wanted)
    _, plain = case.run(backend, 0.0, wanted)
    _, exact = wide.run("eager", 0.0, wanted)
    out, grads = case.run(backend, 2.0**-4, wanted)
    live = case.y != -100
    assert out.active[live].mean() < 0.95

    def error(name, a, b):
        rows = live if name == "hidden" else slice(None)
        return float((a[name].double() - b[name])[rows].norm() / b[name][rows].norm())

    for name in wanted:
        # a unit whose mass lies within rounding of the threshold may fall on either side
        assert error(name, grads, right) <= 2 * error(name, plain, exact) + 2e-2


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("needed", [("hidden", "weight"), ("hidden",)])
def test_the_budget_changes_no_bit(backend, needed, dtype):
    case = Case(dtype)
    _, first = case.run(backend, 0.2, needed, memory_budget=0)
    _, second = case.run(backend, 0.2, needed)
    for name in needed:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rounded_products_kept_in_part(backend, dtype):
    """Of logp alone, whose 16-bit backward reads rounded products: a kept row and a recomputed one
    of the same unit of work give the bits that a budget of nothing gives."""
    d, e = 12, 0.2
    grads = []
    for budget in (0, 3 * V * dtype.itemsize, None):
        hidden = draw(N, d, seed=1).to(dtype).requires_grad_()
        weight = draw(V, d, seed=2).to(dtype).requires_grad_()
        out = prefkern.linear_logps(
            hidden, weight, labels(), tail_mass=e, memory_budget=budget, backend=backend
        )
        out.logp.sum().backward()
        assert 0 < out.active.mean() < 0.8
        grads.append((hidden.grad, weight.grad))
    for other in grads[1:]:
        assert all(map(torch.equal, grads[0], other))


@pytest.mark.parametrize("shares", [False, True], ids=["own reference head", "shared"])
def test_a_soft_cap_and_a_head_of_both_models(backend, shares):
    """Against full logits: dz carries the slope of the cap where computed, 1 where skipped."""
    d, cap, e = 12, 8.0, 0.2
    h, w, hr = draw(N, d, seed=1, scale=1.5), draw(V, d, seed=2), draw(N, d, seed=6, scale=1.5)
    wr, y = w if shares else draw(V, d, seed=7), labels()
    hidden, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
    head = Head(weight, softcap=cap)
    out = prefkern.linear_divergence(
        hidden, head, y, hr, None if shares else Head(wr, softcap=cap), stats=("logp", "fkl"),
        tail_mass=e, backend=backend,
    )  # fmt: skip
    (out.logp.sum() - 0.4 * out.fkl.sum()).backward()
    z, zr = (cap * torch.tanh(a @ b.T / cap) for a, b in ((h, w), (hr, wr)))
    p, r = z.softmax(1), zr.softmax(1)
    dz = -p - 0.4 * (p - r)
    live = y != -100
    dz[torch.arange(N), y.clamp(min=0)] += 1.0
    masses = torch.maximum(chunk_masses(z), chunk_masses(zr))
    masses[y.clamp(min=0) // C, torch.arange(N)] = torch.inf
    ordered, order = masses.sort(0)
    skipped = torch.zeros_like(masses, dtype=torch.bool)
    skipped.scatter_(0, order, ordered.cumsum(0) <= e)
    assert 0.05 < skipped[:, live].double().mean() < 0.9
    columns = skipped.T.repeat_interleave(C, 1)[:, :V]
    dx = torch.where(columns, 0.0, dz * (1.0 - (z / cap) ** 2)) * live[:, None]
    means = torch.cat([x.mean(1, keepdim=True).expand_as(x) for x in dz.split(C, 1)], 1)
    spread = torch.where(columns, means, dx) * live[:, None]
    torch.testing.assert_close(hidden.grad, dx @ w, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(weight.grad, spread.T @ h, rtol=1e-9, atol=1e-11)


def test_a_statistic_without_a_bound_keeps_every_unit(backend):
    hidden, weight = draw(N, 12, seed=1).requires_grad_(), draw(V, 12, seed=2)
    grads = []
    for tail_mass in (0.0, 1.0):
        hidden.grad = None
        out = prefkern.linear_logps(
            hidden, weight, labels(), stats=("logp", "ent"), tail_mass=tail_mass, backend=backend
        )
        (out.logp + out.ent).sum().backward()
        grads.append(hidden.grad)
    assert torch.equal(*grads)
    assert out.active.tolist() == [float(y != -100) for y in labels().tolist()]


def test_nothing_is_skipped_where_nothing_is_trained(backend):
    out = prefkern.linear_logps(
        draw(N, 12, seed=1), draw(V, 12, seed=2), labels(), tail_mass=0.5, backend=backend
    )
    assert out.active is None


def test_a_row_with_nan_reports_nan(backend):
    hidden = draw(N, 12, seed=1)
    hidden[0, 0] = torch.nan
    hidden.requires_grad_()
    out = prefkern.linear_logps(hidden, draw(V, 12, seed=2), labels(), tail_mass=0.5,
                                backend=backend)  # fmt: skip
    out.logp[1:].sum().backward()
    assert out.logp[0].isnan() and not out.logp[1:].isnan().any()
    assert not hidden.grad[1:].isnan().any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_twice_the_same_bits(backend, dtype):
    case = Case(dtype)
    runs = [case.run(backend, 0.2) for _ in range(2)]
    for name in runs[0][1]:
        assert torch.equal(runs[0][1][name], runs[1][1][name])


def test_in_compiled_code_and_checkpoint_regions(backend):
    weight, y = draw(V, 12, seed=2), labels()

    def loss(hidden):
        out = prefkern.linear_logps(hidden, weight, y, tail_mass=0.3, backend=backend)
        return out.logp.sum(), out.active

    grads = []
    for run in (
        loss,
        torch.compile(loss, fullgraph=True, backend="aot_eager"),
        lambda h: torch.utils.checkpoint.checkpoint(loss, h, use_reentrant=False),
    ):
        hidden = draw(N, 12, seed=1).requires_grad_()
        value, active = run(hidden)
        value.backward()
        grads.append((hidden.grad, active))
    for grad, active in grads[1:]:
        assert torch.equal(grad, grads[0][0]) and torch.equal(active, grads[0][1])


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), "0.1"])
def test_a_mass_that_cannot_be(bad):
    with pytest.raises(ValueError, match=r"tail_mass must be a probability mass in \[0, 1\]"):
        prefkern.linear_logps(
            draw(N, 12, seed=1), draw(V, 12, seed=2), labels(), tail_mass=bad, backend="eager"
        )


LONG = 1200  # more live rows than those from which a sample chooses a frozen head's scheme


def frozen_call(scale, tail_mass, dtype=FP32, run=lambda call: call(), **options):
    """A frozen head under an adapter, and two models where fp32 or fp64 let KL join."""
    d, r = 8, 2
    y = torch.randint(0, V, (LONG,), generator=torch.Generator().manual_seed(3))
    y[::9] = -100
    hidden, u = draw(LONG, d, seed=1, scale=scale).to(dtype), draw(LONG, r, seed=4).to(dtype)
    hidden[y == -100] = torch.nan
    leaf = {"hidden": hidden.requires_grad_(), "u": u.requires_grad_()}
    weight, low = draw(V, d, seed=2).to(dtype), draw(V, r, seed=5, scale=0.1).to(dtype)
    stats = ("logp",) if dtype == BF16 else ("logp", "fkl")
    ref = draw(LONG, d, seed=6, scale=scale).to(dtype), draw(V, d, seed=7).to(dtype)

    def call():
        out = prefkern.linear_divergence(
            leaf["hidden"], Head(weight, low_rank=[(leaf["u"], low)]), y, *ref, stats=stats,
            tail_mass=tail_mass, backend="cpu", **options,
        )  # fmt: skip
        return out.logp, out.active, sum(getattr(out, s).sum() for s in stats)

    logp, active, total = run(call)
    total.backward()
    return y != -100, logp.detach(), active, leaf["hidden"].grad, leaf["u"].grad


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=str)
def test_flat_rows_under_a_frozen_head_give_the_exact_bits(dtype):
    """Every unit is needed, so nothing is skipped, kept or read again."""
    live, logp, active, *grads = frozen_call(0.1, 2.0**-8, dtype)
    _, exact_logp, _, *exact = frozen_call(0.1, 0.0, dtype)
    assert torch.equal(active, live.to(active.dtype)) and torch.equal(logp, exact_logp)
    assert all(map(torch.equal, grads, exact))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_sure_rows_under_a_frozen_head_skip(dtype):
    live, logp, active, *grads = frozen_call(5.0, 2.0**-4, dtype)
    _, exact_logp, _, *exact = frozen_call(5.0, 0.0, dtype)
    assert active[live].mean() < 0.8 and torch.equal(logp, exact_logp)
    again = frozen_call(5.0, 2.0**-4, dtype, memory_budget=0)[3:]
    for grad, other, right in zip(grads, again, exact, strict=True):
        assert torch.equal(grad, other)
        assert 0 < (grad - right)[live].norm() < 0.1 * right[live].norm()


@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_either_scheme_in_compiled_code_and_checkpoint_regions(scale):
    runs = [
        frozen_call(scale, 2.0**-4, run=run)[2:]
        for run in (
            lambda call: call(),
            lambda call: torch.compile(call, fullgraph=True, backend="aot_eager")(),
            lambda call: torch.utils.checkpoint.checkpoint(call, use_reentrant=False),
        )
    ]
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))
