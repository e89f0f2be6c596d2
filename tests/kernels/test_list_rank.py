"""list_rank's Triton kernels under the interpreter: values and u against the eager twin in fp64.

tests/losses/test_list_rank.py runs the op on this backend too; here are the families and options
that it leaves out, blocks beyond the first, and what is special to one program per group.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from cases import FP32, FP64, backends_on
from closeness import assert_no_worse, assert_same_bits
from list_oracles import VARIANTS
from prefkern.kernels import list_rank as host

from prefkern.backends.list_options import FAMILIES
from prefkern.ops.list_rank import list_rank

pytestmark = pytest.mark.skipif("triton" not in backends_on(), reason="the triton backend is off")

LAMBDA = {"weights": "lambda"}
MORE = [
    ("pair", {**LAMBDA, "rank_source": "label", "tie_rank": "average", "normalize": True}),
    ("pair", {**LAMBDA, "form": "dcg2", "rank_source": "label", "log_base": "2"}),
    ("plackett_luce", {"ties": "breslow", "topk": 3}),
    ("plackett_luce", {"ties": "strict", "topk": 3}),
]
SIZES = [3, 0, 1, 16, 2, 17, 33]  # interpreted blocks have 16 items


def _name(value):
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value


def ragged(sizes, *, scale=1.0, seed=0):
    """Some scores and labels tied, some labels masked."""
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = scale * torch.randn(n, generator=g, dtype=FP64)
    scores[torch.rand(n, generator=g) < 0.3] = 0.0
    labels = (6 * torch.rand(n, generator=g, dtype=FP64)).floor() / 4
    labels[torch.rand(n, generator=g) < 0.2] = torch.nan
    return scores, labels, torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


def run(backend, scores, labels, cu, family, options):
    scores = scores.clone().requires_grad_()
    loss = list_rank(scores, labels, cu, family=family, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def check(sizes, family, options, scale=1.0):
    """fp64 sums in another order: 1e-12 of the group's largest number."""
    scores, labels, cu = ragged(sizes, scale=scale)
    got, want = (run(b, scores, labels, cu, family, options) for b in ("triton", "eager"))
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
    for start, end in itertools.pairwise(cu.tolist()):
        size = want[1][start:end].abs().max().item() if end > start else 0.0
        torch.testing.assert_close(
            got[1][start:end], want[1][start:end], rtol=0, atol=1e-12 * size + 1e-18
        )


@pytest.mark.parametrize(("family", "options"), [*VARIANTS, *MORE], ids=_name)
def test_several_blocks(family, options):
    check(SIZES, family, options, scale=3.0)


@pytest.mark.parametrize(("family", "options"), MORE, ids=_name)
def test_wide_scores(family, options):
    check([5, 18], family, options, scale=300.0)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("pair", {**LAMBDA, "tie_rank": "average", "normalize": True}),
        ("plackett_luce", {"ties": "strict", "item_gain": "exp2"}),
        ("softmax", {"target": "sum"}),
    ],
    ids=_name,
)
def test_a_list_of_1024(family, options, monkeypatch):
    """In blocks of 256, which the interpreter passes through four times a row."""
    launches = importlib.import_module("prefkern.kernels.launches")
    tiles = importlib.import_module("prefkern.kernels.tiles")
    wide = tiles.Tile({"BLOCK": 256}, 1, 1)
    monkeypatch.setattr(launches, "choose", lambda *_: wide)
    check([1024], family, options)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_scores_are_rounded_once(family):
    """No worse than half a unit of the last place, of each result and beside the eager twin."""
    scores, labels, cu = ragged([4, 9, 18], scale=5.0)
    scores, labels = scores.to(FP32), labels.to(FP32)
    got, base = (run(b, scores, labels, cu, family, {}) for b in ("triton", "eager"))
    truth = run("triton", scores.double(), labels.double(), cu, family, {})
    for what, a, b, c in zip(("loss", "slope"), got, base, truth, strict=True):
        assert a.dtype == FP32
        assert_same_bits(a, c.to(FP32), what)
        floor = torch.finfo(FP32).eps * c.abs().max().item()
        assert_no_worse(a, b, c, floor=(floor, floor), what=what)


@pytest.mark.parametrize(
    ("family", "options"), [("pair", LAMBDA), ("plackett_luce", {}), ("softmax", {})], ids=_name
)
def test_same_bits_again_and_beside_other_groups(family, options):
    scores, labels, cu = ragged([17, 5, 20])
    first, again = (run("triton", scores, labels, cu, family, options) for _ in range(2))
    rows = slice(int(cu[1]), int(cu[2]))
    alone = run(
        "triton", scores[rows], labels[rows], torch.tensor([0, 5], dtype=torch.int32), family,
        options,
    )  # fmt: skip
    for a, b, c in zip(first, again, (first[0][1:2], first[1][rows]), strict=True):
        assert_same_bits(a, b)
        assert_same_bits(c, alone[0] if c.shape == (1,) else alone[1])


def test_a_sure_list_keeps_its_digits():
    """One item far ahead: l = log1p(2 e^-40), which log(1 + x) in fp64 would give as 0."""
    scores = torch.tensor([40.0, 0.0, 0.0], dtype=FP64)
    labels, cu = torch.tensor([1.0, 0.0, 0.0], dtype=FP64), torch.tensor([0, 3], dtype=torch.int32)
    want = 2 * torch.exp(torch.tensor(-40.0, dtype=FP64)).item()
    for family, options in (("plackett_luce", {"topk": 1}), ("softmax", {"alpha": 1e-3})):
        loss, slope = run("triton", scores, labels, cu, family, options)
        assert loss.item() == pytest.approx(want, rel=1e-14)
        assert slope.tolist() == pytest.approx([-want, want / 2, want / 2], rel=1e-14)


def test_host_and_kernels_agree_on_the_bits_of_flags():
    for names, module in ((host.PAIR_FLAGS, "list_pairs"), (host.CHOICE_FLAGS, "list_choices")):
        kernels = importlib.import_module(f"prefkern.kernels.{module}")
        for bit, name in enumerate(names):
            assert getattr(kernels, name.upper()).value == 1 << bit


@pytest.mark.parametrize("family", FAMILIES)
def test_items_that_no_group_holds_have_slope_0(family):
    """The op's boundaries must cover all items where they can be read; on a GPU they need not."""
    scores, labels, cu = ragged([3, 0, 20], scale=2.0)
    around = torch.cat([torch.full((70,), torch.nan), scores, torch.ones(5)])
    graded = torch.cat([torch.ones(70), labels, torch.zeros(5)]).double()
    loss, slope = host.list_rank_fwd(around, graded, cu + 70, None, family, "")
    want = host.list_rank_fwd(scores, labels, cu, None, family, "")
    assert_same_bits(loss, want[0])
    assert_same_bits(slope[70:-5], want[1])
    assert (slope[:70] == 0).all() and (slope[-5:] == 0).all()
    loss, slope = host.list_rank_fwd(around, graded, cu[:1], None, family, "")
    assert loss.shape == (0,) and (slope == 0).all()


def test_an_infinite_label_breaks_its_group():
    scores, labels, cu = ragged([4, 5, 3])
    labels[5], labels[6] = torch.inf, torch.nan
    for family in FAMILIES:
        loss, slope = host.list_rank_fwd(scores, labels, cu, None, family, "")
        assert loss.isnan().tolist() == [False, True, False]
        assert slope.isnan().sum() == (~labels[4:9].isnan()).sum()
