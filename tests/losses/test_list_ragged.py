"""Ranking losses in plain torch (prefkern.losses.lists); likelihood terms of list losses."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from closeness import assert_same_bits
from list_oracles import lse, softplus
from loss_batch import cu

from prefkern import losses
from prefkern.losses import lists

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")


def case(name: str, **args):
    return pytest.param(functools.partial(losses.LOSSES[name], **args), id=f"{name}-{args}")


CASES = [
    case("lipo", beta=1.0, variant="hinge", pair_reduction="mean", scale_by_list_size=True),
    case("pal", margin=-0.25),
    case("rrhf", sft_weight=0.0),
    case("knowpat", sft_weight=0.0),
    case("knowpat", sft_weight=0.0, inner="mean"),
    case("pro", sft_weight=0.0),
    case("nca", beta=1.0, alpha=0.5),
    case("rank_gap_hinge"),
    case("rank_gap_hinge", mode="product", per_item=True, scale=0.5),
    case("set_contrast", beta=1.0, alpha=0.5),
    case("approx_ndcg", beta=1.0, temperature=0.5),
    case("neural_ndcg", beta=1.0, temperature=0.7, sinkhorn_iters=5),
]
every = pytest.mark.parametrize("loss", CASES)
SIZES = [3, 0, 1, 6, 4, 12]


def drawn(sizes, seed=0, masked=True):
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = torch.randn(n, generator=g, dtype=torch.float64)
    scores[torch.rand(n, generator=g) < 0.2] = 0.0
    labels = torch.randint(0, 4, (n,), generator=g).double() / 2
    if masked:
        labels[torch.rand(n, generator=g) < 0.2] = torch.nan
    return scores.requires_grad_(), labels, cu(0, *itertools.accumulate(sizes))


def value_and_slope(loss, scores, labels, bounds):
    scores = scores.detach().requires_grad_()
    found = loss(scores, labels, bounds)
    return found.detach(), torch.autograd.grad(found.sum(), scores)[0]


def name_of(loss) -> str:
    return loss.func.name


# ---- against loops and differences ---------------------------------------------------------------


def hinge(s, y, margin, **_):
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if y[i] > y[j]]
    return sum(max(0.0, margin - s[i] + s[j]) for i, j in pairs), len(pairs)


def oracle(name, s, y):
    """Loss of one group without masked items, with the arguments of CASES."""
    k = len(s)
    if name in ("lipo", "pal", "rrhf"):
        total, pairs = hinge(s, y, {"lipo": 1.0, "pal": -0.25, "rrhf": 0.0}[name])
        by = {"lipo": k / max(pairs, 1), "pal": 1 / max(pairs, 1), "rrhf": 1.0}[name]
        return total * by
    if name == "nca":
        norm = lse([v / 0.5 for v in y])
        q = [math.exp(v / 0.5 - norm) for v in y]
        return sum(w * softplus(-v) + softplus(v) / k for w, v in zip(q, s, strict=True))
    if len(set(y)) < 2:
        return 0.0
    order = sorted(range(k), key=lambda i: (-y[i], i))
    total = 0.0
    for place, best in enumerate(order[:-1]):
        rest = order[place + 1 :]
        own = max(y[best] - y[i] for i in rest) * s[best]
        total += lse([own] + [(y[best] - y[i]) * s[i] for i in rest]) - own
    return total


@pytest.mark.parametrize("loss", [c for c in CASES if name_of(c.values[0]) in
                                  ("lipo", "pal", "rrhf", "nca", "pro")])  # fmt: skip
def test_against_loops(loss):
    scores, labels, bounds = drawn(SIZES)
    found = loss(scores, labels, bounds)
    for g, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        kept = [i for i in range(start, end) if not labels[i].isnan()]
        want = oracle(name_of(loss), scores[kept].tolist(), labels[kept].tolist()) if kept else 0.0
        assert found[g].item() == pytest.approx(want, rel=1e-12, abs=1e-13)


@every
def test_slopes_by_finite_differences(loss):
    if name_of(loss) == "knowpat":
        # Its anchors' weights are constant by definition: the vectors prove the slope.
        loss = functools.partial(loss, length=torch.ones(sum(SIZES)))
        assert value_and_slope(loss, *drawn(SIZES))[1].isfinite().all()
        return
    scores, labels, bounds = drawn(SIZES)
    with torch.no_grad():
        scores += 0.01 * torch.arange(scores.numel())  # off the kinks
    (grad,) = torch.autograd.grad(loss(scores, labels, bounds).sum(), scores)
    steps = 1e-6 * torch.eye(scores.numel(), dtype=torch.float64)
    with torch.no_grad():
        ends = [[loss(scores + d * e, labels, bounds).sum() for d in (1, -1)] for e in steps]
    slope = torch.tensor([(a - b).item() / 2e-6 for a, b in ends], dtype=torch.float64)
    torch.testing.assert_close(grad, slope, rtol=1e-6, atol=1e-7)


# ---- one table, blocks, rows of long lists -------------------------------------------------------


@every
@pytest.mark.parametrize("cells", [1, 50, 400, 1 << 20])
def test_blocks_of_any_size_give_the_same(loss, cells, monkeypatch):
    """One table for the batch, blocks of lists, rows of single lists, all in one block."""
    batch = drawn([5, 2, 0, 31, 9, 1, 20, 2, 40])
    whole = value_and_slope(loss, *batch)
    monkeypatch.setattr(lists, "WHOLE", 0)
    monkeypatch.setattr(lists, "CELLS", cells)
    cut = value_and_slope(loss, *batch)
    for got, want in zip(cut, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for got, want in zip(value_and_slope(loss, *batch), cut, strict=True):
        assert_same_bits(got, want)


def test_many_lists_and_a_long_one_in_bounded_memory():
    """20,000 lists and one of 3,000: no table of more than CELLS numbers, none kept."""
    scores, labels, bounds = drawn([4, 9] * 10_000 + [3000], masked=False)
    largest, kept = 0, 0

    def row(own, other, pair):
        nonlocal largest
        largest = max(largest, pair.numel())
        return torch.where(pair, torch.sigmoid(other[0] - own[0]), 0.0).sum(-1)

    def note(x):
        nonlocal kept
        kept += x.numel()
        return x

    found = lists.Lists(scores, labels, bounds)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        total = found.rows(row, found.score)
    assert largest <= lists.CELLS
    assert kept < 12 * scores.numel() * 30  # a few numbers per item and block, no table
    total.sum().backward()
    assert scores.grad.isfinite().all()


@every
def test_traces_whole(loss):
    batch = drawn([3, 0, 1, 7, 2])
    torch.compiler.reset()

    def step(s):
        return loss(s, *batch[1:])

    got = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)(batch[0])
    torch.testing.assert_close(got, step(batch[0]), rtol=1e-13, atol=1e-14)


# ---- edges ---------------------------------------------------------------------------------------


@every
def test_degenerate_lists(loss):
    nan = float("nan")
    labels = torch.tensor([nan, 0.5, nan, 1.0, 1.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    scores = torch.tensor([nan, 0.3, nan, 0.2, -0.4, 1.0, 2.0, 3.0]).double()
    bounds = cu(0, 0, 1, 3, 5, 8)
    found, grad = value_and_slope(loss, scores, labels, bounds)
    assert found.isfinite().all() and grad.isfinite().all()
    assert (found[:2] == 0).all() and (grad[[0, 2]] == 0).all()
    if name_of(loss) != "nca":  # which acts on one item and on equal ones
        assert (found == 0).all() and (grad == 0).all()


@every
@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]])
def test_no_groups_and_no_items(loss, bounds):
    empty = torch.zeros(0, dtype=torch.float64)
    found, grad = value_and_slope(loss, empty, empty, cu(*bounds))
    assert found.tolist() == [0.0] * (len(bounds) - 1) and grad.shape == (0,)


@every
@pytest.mark.parametrize("whole", [True, False], ids=["one_table", "blocks"])
def test_lists_do_not_see_each_other(loss, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(lists, "WHOLE", 0)
    sizes = [5, 2, 31, 1, 9]
    scores, labels, bounds = drawn(sizes, masked=False)
    found, grad = value_and_slope(loss, scores, labels, bounds)
    for g, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        alone = value_and_slope(loss, scores[start:end], labels[start:end], cu(0, end - start))
        torch.testing.assert_close(alone[0][0], found[g], rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(alone[1], grad[start:end], rtol=1e-12, atol=1e-14)
    for bad in (torch.nan, torch.inf):
        hurt = scores.detach().clone()
        hurt[6] = bad
        broken, slope = value_and_slope(loss, hurt, labels, bounds)
        assert broken.isnan().tolist() == [False, True, False, False, False]
        assert slope.isnan().nonzero().flatten().tolist() == [5, 6]
        assert_same_bits(slope[7:], grad[7:])


@every
@pytest.mark.parametrize("whole", [True, False], ids=["one_table", "blocks"])
def test_items_that_no_group_holds_have_slope_0(loss, whole, monkeypatch):
    """As on a GPU, where boundaries are not read."""
    if not whole:
        monkeypatch.setattr(lists, "WHOLE", 0)
    loss = functools.partial(loss, backend="eager")
    scores, labels, bounds = drawn([5, 0, 9])
    want = value_and_slope(loss, scores, labels, bounds)
    monkeypatch.setattr("prefkern.checks.check_boundaries", lambda *_, **__: None)
    around = torch.cat([torch.full((3,), torch.nan), scores.detach(), torch.ones(2)])
    graded = torch.cat([torch.ones(3), labels, torch.zeros(2)])
    found, slope = value_and_slope(loss, around, graded, bounds + 3)
    torch.testing.assert_close(found, want[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(slope[3:-2], want[1], rtol=1e-13, atol=1e-14)
    assert (slope[:3] == 0).all() and (slope[-2:] == 0).all()


@every
def test_first_step_at_tied_scores(loss):
    """Every score 0: finite values, and slopes that push better answers up, if any."""
    labels = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    found, grad = value_and_slope(loss, torch.zeros(3, dtype=torch.float64), labels, cu(0, 3))
    assert found.isfinite().all() and grad[0] <= 0 and grad[1] >= 0


@every
def test_huge_scores_elsewhere_leave_no_trace(loss):
    scores, labels, bounds = drawn([4, 5], masked=False)
    small = value_and_slope(loss, scores, labels, bounds)
    wide = scores.detach().clone()
    wide[4:] *= 1e30
    found, grad = value_and_slope(loss, wide, labels, bounds)
    assert_same_bits(found[:1], small[0][:1])
    assert_same_bits(grad[:4], small[1][:4])


@every
def test_fp32_scores_are_computed_in_fp64_and_rounded_at_the_end(loss):
    scores, labels, bounds = drawn([4, 9, 18])
    low = scores.detach().float()
    got = value_and_slope(loss, low, labels, bounds)
    want = value_and_slope(loss, low.double(), labels, bounds)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2**-22, atol=2e-45)


def test_a_label_that_is_the_mean_belongs_to_the_lower_side():
    """0.3 is the mean of 0.1, 0.3 and 0.5 as decimals; in fp32 their sum is not three times 0.3."""
    scores = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    found = []
    for dtype in (torch.float32, torch.float64):
        labels = torch.tensor([0.1, 0.3, 0.5], dtype=dtype)
        found.append(losses.set_contrast(scores, labels, cu(0, 3), beta=1.0, alpha=0.0).item())
    want = lse(scores.tolist()) - scores[2].item()
    assert found == pytest.approx([want, want], rel=1e-12)
    for tenths in itertools.combinations(range(1, 10), 3):
        low, middle, high = sorted(tenths)
        labels = torch.tensor(tenths, dtype=torch.float32) / 10
        got = losses.set_contrast(scores, labels, cu(0, 3), beta=1.0, alpha=0.0).item()
        top = [s for s, t in zip(scores.tolist(), tenths, strict=True) if 3 * t > sum(tenths)]
        assert got == pytest.approx(lse(scores.tolist()) - lse(top)), (low, middle, high)


BAD = [
    ("rank_gap_hinge", {"mode": "both"}, "mode must be one of"),
    ("rank_gap_hinge", {"scale": math.inf}, "scale must be a finite number"),
    ("knowpat", {"inner": "max"}, "inner must be one of"),
    ("lipo", {"variant": "hinge", "margin": math.nan}, "margin must be a finite number"),
    ("lipo", {"variant": "hinge", "pair_reduction": "max"}, "pair_reduction must be one of"),
    ("approx_ndcg", {"temperature": 0.0}, "temperature must be a finite number > 0"),
    ("neural_ndcg", {"temperature": -1.0}, "temperature must be a finite number > 0"),
    ("neural_ndcg", {"sinkhorn_iters": 0}, "sinkhorn_iters must be from 1 to 1000"),
    ("neural_ndcg", {"sinkhorn_iters": 2**63 - 1}, "sinkhorn_iters must be from 1 to 1000"),
    ("neural_ndcg", {"sinkhorn_iters": 2.5}, "sinkhorn_iters must be an int"),
    ("set_contrast", {"alpha": math.inf}, "alpha must be a finite number"),
    ("nca", {"alpha": 0.0}, "alpha must be a finite number > 0"),
]


@pytest.mark.parametrize(("name", "args", "message"), BAD)
def test_bad_arguments(name, args, message):
    with pytest.raises(ValueError, match=message):
        losses.LOSSES[name](*drawn([3]), **args)


@every
def test_bad_tensors(loss):
    scores, labels, bounds = drawn([3, 2], masked=False)
    for s, y, c, message in (
        (scores.bfloat16(), labels, bounds, "float32 or float64"),
        (scores, labels[:3], bounds, "numbers"),
        (scores, labels.clone().requires_grad_(), bounds, "must not require grad"),
        (scores, labels, cu(0, 3, 4), "start at 0 and end at 5"),
        (scores, torch.tensor([0.0, torch.inf, 1.0, 1.0, 0.0]), bounds, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(s, y, c)


# ---- terms beside the ranking --------------------------------------------------------------------


def test_likelihood_terms_of_lists():
    scores = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    labels = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    logp = torch.tensor([-10.0, -20.0, -30.0], dtype=torch.float64)
    got = losses.rrhf(scores, labels, cu(0, 3), logp=logp, rrhf_weight=2.0, sft_weight=0.5)
    assert got.item() == pytest.approx(2.0 * (1.0 + 2.0) + 0.5 * 20.0)
    plain = losses.knowpat(scores, labels, cu(0, 3), sft_weight=0.0)
    with_best = losses.knowpat(scores, labels, cu(0, 3))
    assert (with_best - plain).item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="likelihood term needs logp"):
        losses.rrhf(scores, labels, cu(0, 3))
    empty = torch.tensor([5.0, 0.0, 5.0])
    got = losses.rrhf(scores, labels, cu(0, 3), logp=logp, length=empty)
    assert got.item() == pytest.approx(2.0 + 30.0)


def test_soft_pairs_refuses_and_drops():
    scores, labels = torch.zeros(3), torch.tensor([1.0, float("nan"), 0.0])
    where = torch.tensor([[0, 1], [0, 2]])
    got = losses.soft_pairs(scores, labels, cu(0, 3), pairs=where, pref_prob=torch.ones(2))
    assert got.item() == pytest.approx(math.log(2.0))
    with pytest.raises(ValueError, match=r"pairs must be integers \[M, 2\]"):
        losses.soft_pairs(scores, labels, cu(0, 3), pairs=where[0], pref_prob=torch.ones(2))
