"""list_rank's native kernels: against the eager twin up to K = 1024, threads, instruction sets."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import FP32, FP64, backends_on
from closeness import assert_no_worse, assert_same_bits
from list_oracles import oracle

from prefkern.backends.list_options import pack
from prefkern.ops.list_rank import list_rank

pytestmark = pytest.mark.skipif("cpu" not in backends_on(), reason="the native backend is off")

LAMBDA = {"weights": "lambda"}
VARIANTS = [
    ("pair", {}),
    ("pair", {"pair_reduction": "mean", "scale_by_list_size": True}),
    ("pair", {"weights": "labeldiff"}),
    ("pair", LAMBDA),
    ("pair", {**LAMBDA, "gain": "linear", "log_base": "2", "normalize": True, "topn": 3}),
    ("pair", {**LAMBDA, "rank_source": "label", "tie_rank": "average", "normalize": True}),
    ("pair", {**LAMBDA, "tie_rank": "average"}),
    ("pair", {**LAMBDA, "form": "dcg2"}),
    ("pair", {**LAMBDA, "form": "dcg2", "rank_source": "label", "log_base": "2"}),
    *[("plackett_luce", {"ties": t}) for t in ("strict", "stable", "breslow")],
    *[("plackett_luce", {"ties": t, "topk": 3}) for t in ("strict", "stable", "breslow")],
    ("plackett_luce", {"ties": "breslow", "item_gain": "exp2"}),
    ("softmax", {"target": "sum"}),
    ("softmax", {"target": "none"}),
    ("softmax", {"alpha": 1e-3}),
]
variants = pytest.mark.parametrize(
    ("family", "options"),
    VARIANTS,
    ids=["-".join([f, *(f"{k}={v}" for k, v in o.items())]) for f, o in VARIANTS],
)
# every remainder of a vector of 2, 4 or 8 lanes; 0 and 1; several vectors
SMALL = [3, 0, 1, 7, 2, 16, 12, 5, 1, 31, 64, 65, 8, 9, 15, 17, 4, 6, 10, 11, 13, 14]
# these put neighbours of like sizes, up to 32 items, into the lanes of a vector
IN_LANES = ("pair", "plackett_luce")
ALIKE = [*[16] * 8, 4, 3, 4, 2, 4, 4, 1, 4, *[32] * 8, *[33] * 8, *[0] * 8, *[1] * 8, 5, 5]


def ragged(sizes, *, labels="distinct", scale=1.0, tied_scores=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = scale * torch.randn(n, generator=g, dtype=FP64)
    scores[torch.rand(n, generator=g) < tied_scores] = 0.0
    y = torch.rand(n, generator=g, dtype=FP64)
    if labels == "tied":
        y = (4 * y).floor() / 2
    y[torch.rand(n, generator=g) < 0.2] = torch.nan
    return scores, y, torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


def value_and_slope(scores, labels, cu, backend, family, options):
    scores = scores.clone().requires_grad_()
    loss = list_rank(scores, labels, cu, family=family, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def check(sizes, family, options, **layout):
    """fp64 arithmetic in another order: 1e-12 of a group's largest number."""
    scores, labels, cu = ragged(sizes, **layout)
    got, want = (value_and_slope(scores, labels, cu, b, family, options) for b in ("cpu", "eager"))
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
    for g in range(len(sizes)):
        rows = slice(int(cu[g]), int(cu[g + 1]))
        size = want[1][rows].abs().max().item() if sizes[g] else 0.0
        torch.testing.assert_close(got[1][rows], want[1][rows], rtol=0, atol=1e-12 * size + 1e-18)


@variants
@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("labels", ["distinct", "tied"])
def test_small_lists(family, options, labels, scale):
    check(SMALL, family, options, labels=labels, scale=scale)


@pytest.mark.parametrize("labels", ["distinct", "tied"])
@pytest.mark.parametrize(("family", "options"), [v for v in VARIANTS if v[0] in IN_LANES], ids=str)
def test_neighbours_of_like_sizes(family, options, labels):
    check(ALIKE, family, options, labels=labels, scale=3.0)
    check(ALIKE[:8], family, options, labels=labels, scale=200.0)


def test_a_broken_score_stays_in_its_lane():
    scores, labels, cu = ragged([16] * 8)
    scores[20], labels[20] = torch.inf, 0.5
    scores[40], labels[40] = torch.nan, torch.nan  # masked: nobody reads it
    loss, slope = value_and_slope(scores, labels, cu, "cpu", "pair", LAMBDA)
    assert loss.isnan().tolist() == [g == 1 for g in range(8)]
    valid = ~labels.isnan().reshape(8, 16)
    assert torch.equal(slope.reshape(8, 16).isnan(), loss.isnan()[:, None] & valid)


@variants
def test_long_lists(family, options):
    check([1024, 33, 1000, 517], family, options, labels="distinct", scale=3.0, tied_scores=0.1)


@variants
def test_fp32_is_no_worse_than_the_eager_twin(family, options):
    """The native kernels compute fp32 input in fp64 and round once."""
    scores, labels, cu = ragged(SMALL, scale=5.0)
    scores, labels = scores.to(FP32), labels.to(FP32)
    got, base = (value_and_slope(scores, labels, cu, b, family, options) for b in ("cpu", "eager"))
    truth = value_and_slope(scores.double(), labels.double(), cu, "eager", family, options)
    for what, a, b, c in zip(("loss", "slope"), got, base, truth, strict=True):
        assert a.dtype == FP32
        floor = torch.finfo(FP32).eps * c.abs().max().item()
        assert_no_worse(a, b, c, floor=(floor, floor), what=what)


@variants
def test_same_bits_for_any_number_of_threads(family, options):
    scores, labels, cu = ragged([16] * 300 + [200] + SMALL)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(value_and_slope(scores, labels, cu, "cpu", family, options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other[0], results[0][0])
        assert_same_bits(other[1], results[0][1])


def test_a_sure_list_keeps_its_digits():
    """One item far ahead: l = log1p(2 e^-40), which log(1 + x) in fp64 would give as 0."""
    scores = torch.tensor([40.0, 0.0, 0.0], dtype=FP64)
    labels, cu = torch.tensor([1.0, 0.0, 0.0], dtype=FP64), torch.tensor([0, 3], dtype=torch.int32)
    for family, options in (("plackett_luce", {"topk": 1}), ("softmax", {"alpha": 1e-3})):
        loss, slope = value_and_slope(scores, labels, cu, "cpu", family, options)
        want = 2 * torch.exp(torch.tensor(-40.0, dtype=FP64)).item()
        assert loss.item() == pytest.approx(want, rel=1e-14)
        assert slope.tolist() == pytest.approx([-want, want / 2, want / 2], rel=1e-14)


@pytest.mark.parametrize("on", ["cpu", "eager"])
def test_many_groups_and_one_big_one(on):
    """1e5 lists of 16 in blocks; a list of 1500 beside them. Spot-checked against the oracle."""
    sizes = [16] * 100_000 + [1500]
    n = sum(sizes)
    g = torch.Generator().manual_seed(5)
    scores = torch.randn(n, generator=g).requires_grad_()
    labels = torch.rand(n, generator=g)
    cu = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    loss = list_rank(scores, labels, cu, family="plackett_luce", backend=on)
    loss.sum().backward()
    assert torch.isfinite(scores.grad).all()
    for group in (0, 777, 99_999, 100_000):
        rows = slice(int(cu[group]), int(cu[group + 1]))
        want = oracle(scores[rows].tolist(), labels[rows].tolist(), "plackett_luce")
        assert loss[group].item() == pytest.approx(want, rel=1e-5)


def test_an_infinite_label_breaks_its_group():
    """The op refuses it; kernels that were called directly, as on a GPU, give NaN."""
    scores, labels, cu = ragged([16] * 9 + [40], tied_scores=0.0)
    labels[20], labels[150] = torch.inf, -torch.inf
    for family in ("pair", "plackett_luce", "softmax"):
        loss, slope = torch.ops.prefkern_native.list_rank_fwd(scores, labels, cu, None, family, "")
        assert loss.isnan().nonzero().flatten().tolist() == [1, 9]
        assert slope.isnan().sum() == (~labels[16:32].isnan()).sum() + (~labels[144:].isnan()).sum()


@pytest.mark.parametrize("difference", [700.0, 740.0, 800.0, 1e300])
def test_wide_margins(difference):
    scores = torch.tensor([difference, -difference, 0.0], dtype=FP64)
    labels, cu = torch.tensor([0.0, 2.0, 1.0], dtype=FP64), torch.tensor([0, 3], dtype=torch.int32)
    for family in ("pair", "plackett_luce", "softmax"):
        got, want = (value_and_slope(scores, labels, cu, b, family, {}) for b in ("cpu", "eager"))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights=gain", "option"),
        ("weight=lambda", "option"),
        ("margin", "option"),
        ("alpha=0,5", "alpha must be a number that fits"),
        ("alpha=nan", "alpha must be > 0"),
        ("topn=9223372036854775808", "topn must be a number that fits"),
        ("topn=-1", "topn must be >= 0"),
    ],
)
def test_a_direct_call_refuses_what_it_does_not_know(text, message):
    args = (torch.zeros(2), torch.zeros(2), torch.tensor([0, 2], dtype=torch.int32), None)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.prefkern_native.list_rank_fwd(*args, "pair", text)
    with pytest.raises(RuntimeError, match="family"):
        torch.ops.prefkern_native.list_rank_fwd(*args, "pairs", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 1)}, "scores"),
        ({1: torch.zeros(2, dtype=FP64)}, "dtype"),
        ({1: torch.zeros(3)}, "labels"),
        ({2: torch.tensor([0, 3], dtype=torch.int32)}, "start at 0 and end"),
        ({2: torch.tensor([0, 2])}, "int32"),
        ({3: torch.tensor([1, 1])}, "topk"),
    ],
)
def test_a_direct_call_checks_what_guards_memory(change, message):
    args = [torch.zeros(2), torch.zeros(2), torch.tensor([0, 2], dtype=torch.int32), None]
    for place, value in change.items():
        args[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.prefkern_native.list_rank_fwd(*args, "plackett_luce", "")


CODE = """
import sys
sys.path[:0] = [{tests!r}, {ops!r}]
import test_list_rank_native as t
from prefkern.backends import cpu
assert cpu.isa() == {isa!r}, cpu.isa()
for family, options in t.VARIANTS:
    for labels in ("distinct", "tied"):
        t.check(t.SMALL, family, options, labels=labels, scale=30.0)
    if family in t.IN_LANES:
        t.check(t.ALIKE, family, options)
print("ok")
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(isa):
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(tests=str(here.parent), ops=str(here), isa=isa)],
        capture_output=True,
        text=True,
        env={**os.environ, "PREFKERN_CPU_ISA": isa},
        check=False,
    )
    if isa != "baseline" and "PREFKERN_CPU_ISA must name kernels that this CPU" in done.stderr:
        pytest.skip(f"this machine cannot run {isa}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "ok"


COMMA = """
import locale
import torch
from prefkern.ops.error_sum import error_sum
from prefkern.ops.list_rank import list_rank
from prefkern.ops.linear_stats import linear_divergence

STATS = ("jsd:0.5", "alpha:0.3", "renyi:0.5", "mix:0.25", "bkl:3", "logp", "fkl")

def run():
    h, r = torch.linspace(-2.0, 2.0, 12).reshape(3, 4), torch.linspace(1.0, -2.0, 12).reshape(3, 4)
    w, t, numbers = torch.linspace(-1.0, 1.0, 8000).reshape(2000, 4).sin() * 3, torch.arange(3), []
    for stats, tail in ((STATS, 0.0), (("logp",), 0.25)):
        leaf = h.clone().requires_grad_()
        out = linear_divergence(leaf, w, t, r, stats=stats, tail_mass=tail, backend="cpu")
        found = torch.stack([x for x in out if x is not None])
        found.sum().backward()
        numbers += [*found.flatten().tolist(), *leaf.grad.flatten().tolist()]
    s, y = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 1.0, 0.3])
    cu = torch.tensor([0, 3], dtype=torch.int32)
    loss = list_rank(s, y, cu, family="softmax", alpha=0.25, backend="cpu")
    huber = error_sum(s[None], y[None], stats="huber:0.5", backend="cpu").huber
    return numbers, loss.item(), huber.item()

before = run()
locale.setlocale(locale.LC_NUMERIC, {name!r})
assert locale.localeconv()["decimal_point"] == ","
assert run() == before, (run(), before)
print("ok")
"""


def test_numbers_are_read_alike_under_a_decimal_comma(tmp_path):
    """GUI toolkits and servers call setlocale; the C library's strtod then stops at a point."""
    listed = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=False).stdout
    name, path = next((x for x in listed.split() if x.startswith(("de_", "fr_", "es_"))), ""), None
    if not name:
        if shutil.which("localedef") is None:
            pytest.skip("no locale with a decimal comma, and no localedef to make one")
        name, path = "de_DE.UTF-8", str(tmp_path)
        made = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / name)]
        if subprocess.run(made, capture_output=True, check=False).returncode > 1:
            pytest.skip("localedef has no source of de_DE")
    env = {**os.environ, **({} if path is None else {"LOCPATH": path})}
    done = subprocess.run(
        [sys.executable, "-c", COMMA.format(name=name)], capture_output=True, text=True, env=env,
        check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


def test_every_option_reaches_the_kernels():
    """A family's option that the C++ parser did not know would raise here."""
    scores, labels, cu = ragged([5])
    for family, options in VARIANTS:
        text = pack(family, {k: v for k, v in options.items() if k != "topk"})
        torch.ops.prefkern_native.list_rank_fwd(scores, labels, cu, None, family, text)
