"""The list_rank op: loops in plain Python as oracle, ties, ragged shapes, autograd, bad input."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from list_oracles import IDS, VARIANTS, oracle, oracle_slope, ragged

from prefkern.backends.list_options import FAMILIES, ListOptions, pack, unpack
from prefkern.ops.list_rank import list_rank

pytestmark = pytest.mark.usefixtures("on_backend")
SIZES = [3, 0, 1, 7, 2, 0, 12, 5, 1]


@functools.cache
def truth(place: int, masked: bool):
    """(losses, slopes) of VARIANTS[place] by the loops, one of each for every backend."""
    family, options = VARIANTS[place]
    scores, relevance, cu = ragged(SIZES, masked=masked)
    losses, slopes = [], []
    for start, end in itertools.pairwise(cu.tolist()):
        s, y = scores[start:end].tolist(), relevance[start:end].tolist()
        losses.append(oracle(s, y, family, **options))
        slopes += oracle_slope(s, y, family, **options)
    return losses, slopes


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("place", range(len(VARIANTS)), ids=IDS)
def test_against_loops(place, masked):
    family, options = VARIANTS[place]
    scores, relevance, cu = ragged(SIZES, masked=masked)
    loss = list_rank(scores, relevance, cu, family=family, **options)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    losses, slopes = truth(place, masked)
    assert loss.tolist() == pytest.approx(losses, rel=1e-11, abs=1e-11)
    assert grad.tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-7)


# lambda weights by score jump at score ties: there the weights of the tie itself are held.
SMOOTH_AT_TIES = [
    (f, o) for f, o in VARIANTS if o.get("weights") != "lambda" or o.get("rank_source") == "label"
]


@pytest.mark.parametrize(("family", "options"), SMOOTH_AT_TIES, ids=lambda v: str(v))
def test_derivative_where_every_score_is_tied(family, options):
    scores, relevance, cu = ragged([4, 6], tied_scores=True)
    loss = list_rank(scores, relevance, cu, family=family, **options)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    for g in range(2):
        rows = slice(int(cu[g]), int(cu[g + 1]))
        slope = oracle_slope(scores[rows].tolist(), relevance[rows].tolist(), family, **options)
        assert grad[rows].tolist() == pytest.approx(slope, rel=1e-6, abs=1e-7)


def test_first_step_of_lambda_follows_storage_or_averages():
    relevance = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    cu = torch.tensor([0, 3], dtype=torch.int32)

    def slopes(order, **options):
        scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        loss = list_rank(scores, relevance[order], cu, family="pair", weights="lambda", **options)
        return torch.autograd.grad(loss.sum(), scores)[0]

    first, last = slopes([0, 1, 2]), slopes([1, 2, 0])
    assert first[0] != last[2]
    assert slopes([0, 1, 2], tie_rank="average").abs().max() == 0


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=IDS)
def test_second_derivative_is_refused(family, options):
    scores, relevance, cu = ragged([3, 4])
    loss = list_rank(scores, relevance, cu, family=family, **options).sum()
    (grad,) = torch.autograd.grad(loss, scores, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_backward_twice_gives_the_same_bits():
    scores, relevance, cu = ragged([3, 9, 4])
    loss = list_rank(scores, relevance, cu, family="pair", weights="lambda").sum()
    once, twice = (torch.autograd.grad(loss, scores, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("family", FAMILIES)
def test_opcheck(family, backend):
    scores, relevance, cu = ragged([3, 0, 5])
    args = (scores, relevance, cu, None, family, "", backend)
    torch.library.opcheck(torch.ops.prefkern.list_rank_fwd, args)
    slope = torch.randn(8, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.prefkern.list_rank_bwd, (torch.randn(3, dtype=torch.float64), slope, cu)
    )


def test_compiles_whole():
    scores, relevance, cu = ragged([3, 0, 5])

    def step(s):
        return list_rank(2.0 * s, relevance, cu, family="plackett_luce", topk=2).sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(scores)
    want = step(scores)
    assert torch.equal(compiled, want)
    got_grad, want_grad = (torch.autograd.grad(v, scores)[0] for v in (compiled, want))
    assert torch.equal(got_grad, want_grad)


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=IDS)
def test_degenerate_groups(family, options):
    nan = float("nan")
    relevance = torch.tensor([nan, 0.5, nan, 1.0, 1.0], dtype=torch.float64)
    cu = torch.tensor([0, 0, 1, 3, 5], dtype=torch.int32)  # empty, all masked, one left, all equal
    scores = torch.tensor([nan, 0.3, nan, 0.2, -0.4], dtype=torch.float64, requires_grad=True)
    loss = list_rank(scores, relevance, cu, family=family, **options)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()
    assert loss[0] == 0 and loss[1] == 0 and grad[0] == 0 and grad[2] == 0
    assert loss[2] == 0 and grad[1] == 0
    if family == "pair" or (family == "plackett_luce" and options.get("ties") is None):
        assert loss[3] == 0 and (grad[3:] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_groups_and_no_items(family):
    for cu, groups in (([0], 0), ([0, 0, 0], 2)):
        empty = torch.zeros(0, dtype=torch.float64, requires_grad=True)
        bounds = torch.tensor(cu, dtype=torch.int32)
        loss = list_rank(empty, empty.detach(), bounds, family=family)
        assert loss.tolist() == [0.0] * groups
        loss.sum().backward()
        assert empty.grad.shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=IDS)
def test_a_broken_score_breaks_its_own_group_only(family, options, bad):
    scores, relevance, cu = ragged([3, 4, 3])
    with torch.no_grad():
        scores[4] = bad
    loss = list_rank(scores, relevance, cu, family=family, **options)
    assert loss.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert grad.isnan().tolist() == [False] * 3 + [True] * 4 + [False] * 3


ORDER_FREE = [
    (f, o) for f, o in VARIANTS if o.get("ties") != "stable" and o.get("rank_source") != "label"
]


def test_order_inside_groups_and_of_groups_does_not_matter(backend):
    # an interpreted kernel takes 0.1 s, and two of them are called per example
    examples = 8 if backend == "triton" else 25
    settings(max_examples=examples, deadline=None)(given(data=st.data())(_check_order))()


def _check_order(data):
    family, options = data.draw(st.sampled_from(ORDER_FREE))
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    scores, relevance, cu = ragged(
        sizes, seed=data.draw(st.integers(0, 1000)), masked=data.draw(st.booleans())
    )
    loss = list_rank(scores, relevance, cu, family=family, **options)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    groups = data.draw(st.permutations(range(len(sizes))))
    items = [
        i for g in groups for i in data.draw(st.permutations(range(int(cu[g]), int(cu[g + 1]))))
    ]
    moved = scores.detach()[items].requires_grad_()
    new_cu = torch.tensor([0, *itertools.accumulate(sizes[g] for g in groups)], dtype=torch.int32)
    again = list_rank(moved, relevance[items], new_cu, family=family, **options)
    torch.testing.assert_close(again, loss[list(groups)], rtol=1e-12, atol=1e-12)
    (moved_grad,) = torch.autograd.grad(again.sum(), moved)
    torch.testing.assert_close(moved_grad, grad[items], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=IDS)
def test_a_batch_equals_its_groups_alone(family, options):
    sizes = [5, 2, 31, 1, 9]
    scores, relevance, cu = ragged(sizes)
    loss = list_rank(scores, relevance, cu, family=family, **options)
    for g, size in enumerate(sizes):
        rows = slice(int(cu[g]), int(cu[g + 1]))
        alone = list_rank(
            scores[rows],
            relevance[rows],
            torch.tensor([0, size], dtype=torch.int32),
            family=family,
            **options,
        )
        torch.testing.assert_close(alone[0], loss[g], rtol=1e-13, atol=1e-14)


def test_options_survive_their_text():
    for family, options in VARIANTS:
        found = {k: v for k, v in options.items() if k != "topk"}
        assert unpack(pack(family, found)) == ListOptions(**found)
    assert pack("pair", {}) == ""


BAD = [
    (dict(family="pairs"), "family must be one of"),
    (dict(family="pair", weight="lambda"), "nearest: weights"),
    (dict(family="softmax", ties="strict"), "takes the options"),
    (dict(family="pair", gain="exp"), "gain must be one of"),
    (dict(family="pair", form="dcg2", topn=3), "dcg2"),
    (dict(family="pair", topn=-1), "topn must be an int"),
    (dict(family="pair", topn=2**63), "topn must be an int from 0"),
    (dict(family="pair", normalize=1), "True or False"),
    (dict(family="softmax", alpha=0.0), "alpha must be a finite number > 0"),
    (dict(family="softmax", alpha=float("nan")), "alpha must be a finite number > 0"),
    (dict(family="pair", topk=2), "plackett_luce"),
    (dict(family="plackett_luce", topk=0), "topk must be an int >= 1"),
    (dict(family="plackett_luce", topk=torch.tensor([0])), "topk must be >= 1"),
    (dict(family="plackett_luce", topk=1.5), "topk must be an int"),
    (
        dict(family="plackett_luce", topk=torch.tensor([1, 2])),
        r"topk must be an int or integers \[G\]",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_options(options, message):
    scores, relevance, cu = ragged([3])
    with pytest.raises(ValueError, match=message):
        list_rank(scores, relevance, cu, **options)


def test_bad_tensors():
    scores, relevance, cu = ragged([3, 2])

    def refused(message, s=scores, y=relevance, c=cu, **options):
        with pytest.raises(ValueError, match=message):
            list_rank(s, y, c, **{"family": "pair", **options})

    refused("float32 or float64", s=scores.bfloat16())
    refused("float32 or float64", s=scores[None])
    refused("relevance must be numbers", y=relevance[:3])
    refused("relevance must be numbers", y=relevance > 0)
    refused("must not require grad", y=relevance.clone().requires_grad_())
    refused("start at 0 and end at 5", c=torch.tensor([0, 3, 4], dtype=torch.int32))
    refused("never decrease", c=torch.tensor([0, 4, 3, 5], dtype=torch.int32))
    refused("relevance must be >= 0", y=relevance - 2, family="softmax", target="sum")
    refused("backend must be one of", backend="tpu")
    infinite = torch.tensor([0.0, 1.0, torch.nan, -torch.inf, 1.0])
    refused("relevance must be finite.* got -inf at position 3", y=infinite)
    huge = torch.full((5,), 1e300, dtype=torch.float64)  # infinite in the scores' dtype
    refused("relevance must be finite", s=scores.float(), y=huge)


def test_a_count_of_any_size_means_all():
    scores, relevance, cu = ragged([3, 5])
    for many in (5, 2**31, 2**63 - 1, 2**70):
        for topk in (many, torch.full((2,), min(many, 2**63 - 1))):
            assert torch.equal(
                list_rank(scores, relevance, cu, family="plackett_luce", topk=topk),
                list_rank(scores, relevance, cu, family="plackett_luce"),
            )
    with pytest.raises(ValueError, match="topk must be an int >= 1"):
        list_rank(scores, relevance, cu, family="plackett_luce", topk=-(2**70))
    most = list_rank(scores, relevance, cu, family="pair", weights="lambda", topn=2**31 - 1)
    assert torch.equal(most, list_rank(scores, relevance, cu, family="pair", weights="lambda"))
