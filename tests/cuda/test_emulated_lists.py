"""CUDA kernels of list_rank in emulation (tests/emulation.py), against the eager twin in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import FP32, FP64, backends_on
from closeness import assert_no_worse, assert_same_bits
from emulation import List, needed, program

from prefkern.backends import cpu
from prefkern.backends.eager import list_rank as reference_list
from prefkern.backends.list_options import pack

pytestmark = needed


def emulated():
    return program("lists", "list_rank")


LAMBDA = {"weights": "lambda"}
VARIANTS: list[tuple[str, dict]] = [
    ("pair", {}),
    ("pair", {"weights": "labeldiff", "pair_reduction": "mean", "scale_by_list_size": True}),
    ("pair", LAMBDA),
    ("pair", {**LAMBDA, "gain": "linear", "log_base": "2", "normalize": True, "topn": 3}),
    ("pair", {**LAMBDA, "rank_source": "label", "tie_rank": "average", "normalize": True}),
    ("pair", {**LAMBDA, "tie_rank": "average"}),
    ("pair", {**LAMBDA, "form": "dcg2", "pair_reduction": "mean"}),
    ("pair", {**LAMBDA, "form": "dcg2", "rank_source": "label", "log_base": "2"}),
    *[("plackett_luce", {"ties": t}) for t in ("strict", "stable", "breslow")],
    *[("plackett_luce", {"ties": t, "topk": 3}) for t in ("strict", "stable", "breslow")],
    ("plackett_luce", {"ties": "breslow", "item_gain": "exp2"}),
    ("softmax", {"target": "sum"}),
    ("softmax", {"target": "none"}),
    ("softmax", {"alpha": 1e-3}),
]
# Blocks of 32 groups: on 8 lanes, on 16, on 32 with groups that have a block to themselves.
EIGHTS = [3, 0, 1, 7, 2, 8, 4, 5] * 4
SIXTEENS = [3, 16, 0, 9, 1, 12, 2, 15] * 4
RAGGED = [3, 0, 1, 7, 2, 16, 12, 1, 31, 32, 33, 64, 0, 65, 300, 8, 255, 5, 0]
BLOCKS = [*EIGHTS, *SIXTEENS, *RAGGED]


def ragged(sizes, dtype=FP64, *, labels="distinct", scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = scale * torch.randn(n, generator=g, dtype=FP64)
    scores[torch.rand(n, generator=g) < 0.3] = 0.0
    y = torch.rand(n, generator=g, dtype=FP64)
    if labels == "tied":
        y = (4 * y).floor() / 2
    y[torch.rand(n, generator=g) < 0.2] = torch.nan
    cu = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    return scores.to(dtype), y.to(dtype), cu


def variants(scores, labels, cu, **rest) -> list[List]:
    cases = []
    for family, options in VARIANTS:
        options = dict(options)
        k = options.pop("topk", None)
        topk = None if k is None else torch.full((cu.numel() - 1,), k)
        cases.append(List(family, options, scores, labels, cu, topk, **rest))
    return cases


def eager(c: List, dtype=None):
    scores, labels = (x if dtype is None else x.to(dtype) for x in (c.scores, c.labels))
    text = pack(c.family, c.options)
    return reference_list.list_rank_fwd(scores, labels, c.cu, c.topk, c.family, text)


def check_lists(cases: list[List]) -> None:
    """fp64: another order of the same sums. fp32: at most twice the eager twin's error."""
    for c, got in zip(cases, emulated().lists(cases), strict=True):
        truth = eager(c, FP64)
        base = eager(c) if c.scores.dtype == FP32 else None
        for k, what in enumerate(("loss", "slope")):
            name = f"{what} of {c.family} {c.options}"
            if base is not None:
                floor = torch.finfo(FP32).eps * max(truth[k].abs().tolist(), default=0.0)
                assert_no_worse(got[k], base[k], truth[k], floor=(floor, floor), what=name)
                continue
            size = truth[k].abs()
            if k:  # of the largest slope of the group
                parts = [
                    p.max() if p.numel() else p.sum() for p in size.split(c.cu.diff().tolist())
                ]
                size = torch.stack(parts).repeat_interleave(c.cu.diff())
            off = (got[k] - truth[k]).abs() > 1e-12 * size + 1e-14
            assert not off.any(), f"{name}: {off.nonzero()[:5].tolist()}"


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("labels", ["distinct", "tied"])
def test_every_family_on_ragged_lists(dtype, labels):
    for scale in (1.0, 200.0):
        check_lists(variants(*ragged(BLOCKS, dtype, labels=labels, scale=scale)))


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
def test_long_lists(dtype):
    """More items than threads."""
    check_lists(variants(*ragged([40, 1024], dtype, scale=3.0)))


def test_lists_at_the_edges():
    """As many items as threads and as lanes, and one more and less of each."""
    lists = ragged([256, 257, 255, 32, 33, 31], FP32, labels="tied")
    check_lists([List(f, o, *lists) for f, o in (("pair", LAMBDA), ("plackett_luce", {}))])


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
def test_items_that_no_group_holds_have_slope_0(dtype):
    """The memory of the slopes is NaN before the kernel runs."""
    scores, labels, cu = ragged([3, 0, 40, 9], dtype)
    around = torch.cat([scores.new_full((700,), torch.nan), scores, scores.new_full((5,), 1.0)])
    graded = torch.cat([labels.new_ones(700), labels, labels.new_zeros(5)])
    for families in (("pair", {}), ("plackett_luce", {}), ("softmax", {})):
        inside, outside = emulated().lists(
            [List(*families, scores, labels, cu), List(*families, around, graded, cu + 700)]
        )
        assert_same_bits(outside[0], inside[0])
        assert_same_bits(outside[1][700:-5], inside[1])
        assert (outside[1][:700] == 0).all() and (outside[1][-5:] == 0).all()


def test_lists_that_no_kernel_expects():
    """No groups, no items, everything masked, and a list beyond 1024 items in fp32."""
    none = torch.zeros(0)
    nothing = torch.tensor([0], dtype=torch.int32), torch.tensor([0, 0, 0], dtype=torch.int32)
    masked = torch.tensor([0, 2, 3], dtype=torch.int32)
    cases = []
    for family in ("pair", "plackett_luce", "softmax"):
        cases += [List(family, {}, none, none, cu) for cu in nothing]
        cases.append(List(family, {}, torch.ones(3), torch.full((3,), torch.nan), masked))
        cases.append(List(family, {}, *ragged([1300], FP32)))
    check_lists(cases)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
def test_a_list_has_the_same_bits_in_any_company_and_order_of_threads(dtype):
    scores, labels, cu = ragged(RAGGED, dtype)
    batch = emulated().lists(variants(scores, labels, cu))
    back = emulated().lists(variants(scores, labels, cu, reverse=True))
    for (loss, slope), other in zip(batch, back, strict=True):
        assert_same_bits(other[0], loss)
        assert_same_bits(other[1], slope)
    for items in (7, 12, 31, 33):  # alone on 8, 16, 32 lanes and in a block
        place = RAGGED.index(items)
        part = slice(int(cu[place]), int(cu[place + 1]))
        alone = torch.tensor([0, items], dtype=torch.int32)
        single = emulated().lists(variants(scores[part], labels[part], alone))
        for (loss, slope), (own_loss, own_slope) in zip(batch, single, strict=True):
            assert_same_bits(own_loss, loss[place : place + 1])
            assert_same_bits(own_slope, slope[part])


def test_a_score_that_is_no_number_stays_in_its_group():
    scores, labels, cu = ragged([4, 0, 5, 300, 3], FP32)
    labels = torch.arange(scores.numel()) / 64
    labels[5] = torch.nan
    clean = emulated().lists(variants(scores, labels, cu))
    broken = scores.clone()
    broken[5] = torch.nan  # masked: it hides what it holds
    broken[6], labels[20] = torch.inf, -torch.inf
    for (loss, slope), (want_loss, want_slope) in zip(
        emulated().lists(variants(broken, labels, cu)), clean, strict=True
    ):
        assert loss.isnan().tolist() == [False, False, True, True, False]
        whole = torch.tensor([False] * 4 + [True] * 305 + [False] * 3)
        whole[5] = False
        assert_same_bits(slope.isnan(), whole)
        assert_same_bits(slope[~whole], want_slope[~whole])
        assert_same_bits(loss[::4], want_loss[::4])


def test_stages_of_each_group():
    scores, labels, cu = ragged([4, 0, 6, 300, 33], FP64, labels="tied")
    topk = torch.tensor([1, 5, 2, 7, 1000])
    check_lists(
        [
            List("plackett_luce", {"ties": t}, scores, labels, cu, topk)
            for t in ("strict", "stable", "breslow")
        ],
    )


def test_one_pair_in_fp32_is_good_to_a_few_roundings():
    """softplus and sigmoid of the inner loop over their whole range."""
    gap = torch.cat([torch.linspace(-100, 100, 4001), torch.logspace(-30, 0, 200)])
    scores = torch.stack([gap, torch.zeros_like(gap)], 1).reshape(-1)
    labels = torch.tensor([1.0, 0.0]).repeat(gap.numel())
    cu = torch.arange(0, scores.numel() + 1, 2, dtype=torch.int32)
    ((loss, slope),) = emulated().lists([List("pair", {}, scores, labels, cu)])
    want_loss = torch.nn.functional.softplus(-gap.double(), threshold=1e9)
    want_slope = -torch.sigmoid(-gap.double())
    for got, want in ((loss, want_loss), (slope[::2], want_slope), (-slope[1::2], want_slope)):
        torch.testing.assert_close(got.double(), want, rtol=4e-7, atol=2e-38)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
def test_sure_and_wide_lists(dtype):
    """log1p(2 e^-40), which log(1 + x) would give as 0, and margins far beyond the range of e^x."""
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    scores = torch.tensor([40.0, 0.0, 0.0, 1e30, -1e30, 0.0], dtype=dtype)
    labels = torch.tensor([2.0, 1.0, 0.0, 0.0, 2.0, 1.0], dtype=dtype)
    families = ("pair", "plackett_luce", "softmax")
    check_lists([List(f, {}, scores, labels, cu) for f in families])
    case = List("plackett_luce", {}, scores, labels, cu, torch.tensor([1, 1]))
    ((loss, slope),) = emulated().lists([case])
    want = 2 * math.exp(-40.0)
    assert loss[0].item() == pytest.approx(want, rel=1e-6)
    assert slope[:3].tolist() == pytest.approx([-want, want / 2, want / 2], rel=1e-6)


@pytest.mark.skipif("cpu" not in backends_on(), reason="the native backend is off")
def test_scalar_and_vector_forms_agree():
    """csrc/numerics/list.h here, csrc/cpu/double_math.h in the native kernels."""
    cases = variants(*ragged([16, 40], scale=20.0))
    for c, (loss, slope) in zip(cases, emulated().lists(cases), strict=True):
        text = pack(c.family, c.options)
        want = cpu.list_rank_fwd(c.scores, c.labels, c.cu, c.topk, c.family, text)
        torch.testing.assert_close(loss, want[0], rtol=2e-14, atol=1e-15)
        size = want[1].abs().max().item()
        torch.testing.assert_close(slope, want[1], rtol=2e-14, atol=4e-15 * size)


def test_items_past_two_to_the_31():
    """Index arithmetic of items and of bytes of global memory."""
    assert emulated().run(b"far\n") == b"ok"
