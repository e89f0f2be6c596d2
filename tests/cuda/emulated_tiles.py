"""Tiles given to single kernels: chunks, alignment, order of threads, far offsets, bad arguments.

Not collected by itself: test_emulated_heads.py runs it where the emulated library is loaded.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import replace

import pytest
import torch
from cases import BF16, FP16, FP32, FP64
from closeness import assert_same_bits
from tile_calls import call_of, sweep_of

import prefkern
from prefkern.backends import cuda, eager, tables
from prefkern.backends.contract import Folded, Model, written
from prefkern.backends.plan import read_plan
from prefkern.backends.tiled.epilogue import FrozenSums, ProductTile, fold_in_steps

OPS = torch.ops.prefkern_cuda
ONE = ("logp", "ent", "col", "top1", "zmean")
TWO = ("logp", "fkl", "rkl", "jsd:0.3", "alpha:0.4", "renyi:0.6", "tv", "bkl:3", "mix:0.25", "ent")
SMALL_TWO = ("logp", "ref_logp", "fkl", "rkl")
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=lambda d: str(d)[6:])
KERNELS = cuda.Kernels()


def make(stats, m, w, dtype, models):
    """(the call as kernels see it, its logits); a row is ignored, a logit is -inf."""
    g = torch.Generator().manual_seed(w)
    z = [(3 * torch.randn(m, w, generator=g)).to(dtype) for _ in range(models)]
    z[0][:, w // 2] = -math.inf
    targets = torch.randint(0, w, (m,), generator=g)
    targets[m // 2] = -100
    return sweep_of(stats, targets, *(Model(logits=x) for x in z)), z


def in_chunks(chunk):
    kernels = cuda.Kernels()
    kernels.chunk_columns = lambda sweep: chunk
    return kernels


def fold(sweep, z, chunk):
    """Row sums of one tile, folded in chunks, of the rows that count."""
    m, w = z[0].shape
    fields = torch.full((sweep.fields, -(-w // chunk), m), math.nan)
    at = torch.zeros((len(tables.AT), m), dtype=torch.float64)
    in_chunks(chunk).fold(sweep, ProductTile(0, 0, tuple(z)), fields, at, None)
    names = written(sweep.call.plan, False)
    used = fields[[tables.FIELDS.index(name) for name in names]]
    assert not used.isnan().any(), "a field of a finite tile is not written, or not a number"
    sums = KERNELS.arithmetic.merge(sweep.call, fields, torch.arange(0, w, chunk), False)
    live = sweep.targets != sweep.call.ignore_index
    found = {name: sums[tables.FIELDS.index(name)][live] for name in names}
    return found | {"zy": at[0][live]}


@DTYPES
@pytest.mark.parametrize("stats", [("logp",), ONE, SMALL_TWO, TWO], ids=len)
def test_chunks_change_roundings_alone(stats, dtype):
    """A block of several chunks writes one of them and nothing's sums into the others."""
    sweep, z = make(stats, 5, 1500, dtype, 2 if stats in (TWO, SMALL_TWO) else 1)
    want = fold(sweep, z, 1500)
    for chunk in (32, 64, 1024):
        got = fold(sweep, z, chunk)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=2e-5, msg=name)
            if name in ("max", "top", "z_count", "zy"):
                assert_same_bits(got[name], want[name])


def some_coefficients(m):
    """Every term of the gradient but those that would need given values."""
    made = torch.randn(len(tables.COEFFICIENTS), m)
    for name in ("ev", "teach"):
        made[tables.COEFFICIENTS.index(name)] = 0.0
    return made


def shifted(x, by):
    """The same tile with rows `by` elements off a 16-byte boundary."""
    m, w = x.shape
    wide = torch.full((m, w + 24), math.nan, dtype=x.dtype)
    view = wide[:, by : by + w]
    return view.copy_(x)


@DTYPES
@pytest.mark.parametrize("by", [(1, 1), (3, 3), (5, 2), (8, 8)], ids=str)
def test_alignment_changes_roundings_alone(dtype, by):
    sweep, z = make(TWO, 3, 333, dtype, 2)
    off = [shifted(*x) for x in zip(z, by, strict=True)]
    want, got = fold(sweep, z, 333), fold(sweep, off, 333)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=2e-5, msg=name)
    coefficients, places = some_coefficients(3), []
    for x in (z, off):
        dx = shifted(torch.full_like(z[0], math.nan), by[0]) if x is not z else x[0].clone()
        KERNELS.gradient(sweep, ProductTile(0, 0, tuple(x)), coefficients, dx)
        places.append(dx)
    assert_same_bits(places[1], places[0])
    assert (places[0][sweep.targets == -100] == 0).all()


FROZEN_TWO = ("logp", "fkl", "rkl")


@pytest.mark.parametrize(
    ("stats", "dtype", "softcap"),
    [
        (("logp",), BF16, 0.0),
        (("logp",), FP32, 0.0),
        (("logp", "ent"), FP32, 2.0),
        (FROZEN_TWO, FP32, 0.0),
    ],
    ids=["bf16", "fp32", "ent_cap", "two"],
)
def test_a_tile_of_a_frozen_head_in_one_kernel(stats, dtype, softcap):
    """As in steps, for a first tile and a later one whose maxima are higher in some rows, lower in
    others, and -inf in one."""
    names = {("logp", "ent"): ("mass", "log"), FROZEN_TWO: ("mass", "gap", "cross")}
    sums = names.get(stats, ("mass",))
    m, w, depth = 133, 300, 37
    sweep, z = make(stats, m, 2 * w, dtype, 2 if stats == FROZEN_TWO else 1)
    sweep = replace(sweep, options=tuple(o._replace(top=softcap, factor=1.0 / (softcap or 1.0),
                                                    slope=1.0 / softcap if softcap else 0.0)
                                         for o in sweep.options))  # fmt: skip
    z[0][5, :w] = -math.inf
    assert m >= KERNELS.ROWS
    results = []
    for one in (KERNELS.fold_frozen, lambda *given: fold_in_steps(KERNELS, *given)):
        g = torch.Generator().manual_seed(3)
        totals = torch.randn(len(sums), m, depth, generator=g)
        totals[:, 5] = 0.0  # of terms that are all 0
        maxima = torch.full((2, m), torch.finfo(FP32).min)
        found = []
        for v0 in (0, w):
            tile = ProductTile(0, v0, tuple(shifted(x[:, v0 : v0 + w], 3) for x in z))
            fields = torch.full((sweep.fields, -(-w // KERNELS.chunk_columns(sweep)), m), math.nan)
            at = torch.zeros((len(tables.AT), m), dtype=torch.float64)
            out = shifted(torch.full((m, w), math.nan, dtype=dtype), 3)
            state = FrozenSums(sums, totals, maxima, v0 > 0)
            one(sweep, tile, fields, at, state, out)
            row_sums = KERNELS.arithmetic.merge(
                sweep.call, fields, torch.arange(0, w, KERNELS.chunk_columns(sweep)), False
            )
            found += [row_sums, at, out.clone(), totals.clone(), maxima.clone()]
        results.append(found)
    live = sweep.targets != sweep.call.ignore_index
    assert (results[0][2][~live] == 0).all()
    for got, want in zip(*results, strict=True):
        rows = live if got.shape[0] == m else (slice(None), live)
        close = {"rtol": 1e-2, "atol": 1e-3} if got.dtype == BF16 else {"rtol": 1e-5, "atol": 2e-5}
        torch.testing.assert_close(got[rows], want[rows], **close)


def test_launches_are_counted_by_name():
    """Those that a call makes, under names of the list of kernels that ran, and no others."""
    logits = torch.randn(5, 50, requires_grad=True)
    before = cuda.seen_kernels()
    assert before.keys() == cuda.ran_on().keys()
    out = prefkern.logits_logps(logits, torch.arange(5), backend="cuda")
    out.logp.sum().backward()
    found = {k: n - before[k] for k, n in cuda.seen_kernels().items() if n > before[k]}
    ours = ("fold_one_small", "gradient_one_small", "merge_rows", "finish_rows", "pull_rows")
    assert found == dict.fromkeys(ours, 1)


def test_chunks_of_a_tail_are_kept_apart():
    """A call with a tail gets the sums of every chunk of 1,024 columns, by themselves."""
    sweep, z = make(("logp",), 5, 2500, FP32, 1)
    plan = sweep.call.plan
    text = plan.text.replace(";;;", ";;tail:0.1;")
    sweep = replace(sweep, call=sweep.call._replace(plan=read_plan(text)))
    assert sweep.call.plan.tail == 0.1 and KERNELS.chunk_columns(sweep) == tables.CHUNK
    fields = torch.full((sweep.fields, 3, 5), math.nan)
    at = torch.zeros((len(tables.AT), 5), dtype=torch.float64)
    KERNELS.fold(sweep, ProductTile(0, 0, tuple(z)), fields, at, None)
    most, total = (fields[tables.FIELDS.index(name)] for name in ("max", "sum"))
    live = sweep.targets != -100
    for c, part in enumerate(z[0].split(tables.CHUNK, 1)):
        want = part.double().logsumexp(1)[live]
        got = (most[c].double() + total[c].double().log())[live]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_no_bit_depends_on_the_order_of_threads_and_blocks():
    """Of tile kernels and of those on numbers per row."""
    sweep, z = make(TWO, 4, 700, BF16, 2)
    given = shifted(z[0], 3)
    d_out = torch.randn(len(TWO), 4, generator=torch.Generator().manual_seed(0))

    def run():
        leaf = given.clone().requires_grad_()
        out = prefkern.logits_logps(
            leaf, sweep.targets, ref_logits=z[1], stats=TWO, backend="cuda", temperature=0.7
        )
        values = [x for x in out if x is not None]
        sum((x * d).sum() for x, d in zip(values, d_out, strict=True)).backward()
        return [*fold(sweep, z, 64).values(), *(x.detach() for x in values), leaf.grad]

    forwards = run()
    OPS.reverse_threads(True)
    try:
        backwards = run()
    finally:
        OPS.reverse_threads(False)
    for a, b in zip(forwards, backwards, strict=True):
        assert_same_bits(a, b)


def test_rows_past_2_to_the_31_elements():
    """A tile whose third row starts beyond 2^31 elements: memory is mapped, not filled."""
    m, w, stride = 3, 40, (1 << 30) + 8
    no_reserve = 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    far = [
        torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + w), flags=flags), dtype=BF16)
        for _ in range(3)
    ]
    assert 2 * stride > 2**31
    views = [x.as_strided((m, w), (stride, 1)) for x in far]
    sweep, z = make(TWO, m, w, BF16, 2)
    for view, x in zip(views, z, strict=False):
        view.copy_(x)
    want, got = fold(sweep, z, w), fold(sweep, views[:2], w)
    for name in want:
        assert_same_bits(got[name], want[name])
    coefficients, near = some_coefficients(m), torch.empty_like(z[0])
    there = ProductTile(0, 0, tuple(views[:2]))
    KERNELS.gradient(sweep, ProductTile(0, 0, tuple(z)), coefficients, near)
    KERNELS.gradient(sweep, there, coefficients, views[2])
    assert_same_bits(views[2].clone(), near)
    norms = torch.randn(len(tables.NORMS), m)
    sums = [torch.empty(len(tables.SECOND), 1, m) for _ in range(2)]
    KERNELS.fold_again(sweep, ProductTile(0, 0, tuple(z)), norms, sums[0])
    KERNELS.fold_again(sweep, there, norms, sums[1])
    assert_same_bits(*sums)


@pytest.mark.parametrize("wide", [False, True], ids=["fp32", "fp64"])
@pytest.mark.parametrize("m", [1, 37, 200])
def test_numbers_per_row_are_those_of_eager_pytorch(m, wide):
    """merge, norms, finish and pull against their twins, for several blocks of rows and more chunks
    than a row has threads; a chunk of nothing but -inf, an ignored row, a label outside."""
    g = torch.Generator().manual_seed(m)
    acc, w, chunk = FP64 if wide else FP32, 330, 32
    z = [3 * torch.randn(m, w, generator=g, dtype=FP64) for _ in range(2)]
    z[0][:, :chunk] = z[1][:, :chunk] = -math.inf
    targets = torch.randint(chunk, w, (m,), generator=g)
    if m > 1:
        targets[1], targets[m // 2] = w + 3, -100
    call = call_of(TWO, targets, *(Model(logits=x.to(acc)) for x in z))
    fields = eager_fields(call, chunk).to(acc)
    starts, ours = torch.arange(0, w, chunk), KERNELS.arithmetic
    sums = [a.merge(call, fields, starts, False) for a in (ours, eager.arithmetic)]
    torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-12)
    top = torch.stack([z[1].sort(1, descending=True).values[:, :3].T,
                       z[1].argsort(1, descending=True)[:, :3].T.double()])  # fmt: skip
    at = torch.randn(len(tables.AT), m, generator=g, dtype=FP64)
    folded = Folded(sums[0], at, z[0], z[0], top=top)
    second = torch.rand(len(tables.SECOND), m, generator=g, dtype=FP64)
    d_out = torch.randn(len(TWO), m, generator=g, dtype=acc)
    results = []
    for a in (ours, eager.arithmetic):
        out, saved = a.finish(call, folded, second)
        results.append((a.norms(call, folded), out, saved, a.pull(call, d_out, out, saved)))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        tight = {} if got.dtype == FP32 else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(got, want, equal_nan=True, **tight)
    if m > 1:
        assert results[0][1][:, 1].isnan().all() and (results[0][1][:, m // 2] == 0).all()


def eager_fields(call, chunk):
    """[FIELDS, C, M] of chunks, from eager PyTorch's own fold of each."""
    parts = []
    for v0 in range(0, call.V, chunk):
        cut = [m._replace(logits=m.logits[:, v0 : v0 + chunk]) for m in (call.policy, call.ref)]
        own = call._replace(policy=cut[0], ref=cut[1])
        parts.append(eager.fold(own, 0).sums)
    return torch.stack(parts, 1)


def test_a_label_outside_the_vocabulary_gives_nan_and_no_bad_access(monkeypatch):
    monkeypatch.setattr(prefkern.checks, "check_target_range", lambda *_: None)
    logits = torch.randn(4, 50, requires_grad=True)
    targets = torch.tensor([3, 50, -7, -100])
    out = prefkern.logits_logps(logits, targets, stats=("logp", "lse"), backend="cuda")
    for value in (out.logp, out.lse):
        assert value.isnan().tolist() == [False, True, True, False] and value[3] == 0
    (out.logp + out.lse).sum().backward()
    assert (logits.grad[3] == 0).all() and not logits.grad[0].isnan().any()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"fields": torch.empty(4, 3, 5)}, r"fields must have shape \[4, 1, 5\], got \[4, 3, 5\]"),
        ({"x": torch.zeros(5, 40, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
        ({"x": torch.zeros(40, 5).T}, "x must have a contiguous last dimension"),
        ({"targets": torch.zeros(5)}, "targets must be int64; cast it first"),
        ({"at": torch.zeros(3, 5)}, "at must be float64"),
        ({"bias": torch.zeros(39)}, "an entry for every column up to 40, got 39"),
        ({"adv": torch.zeros(40)}, "need float32 tiles and no small kernel"),
        ({"chunk": 0}, r"chunk must lie in \[1, 16777216\], got 0"),
        ({"plan": "logp,what;;;logits"}, "statistics must be distinct names"),
        ({"numbers": [1.0]}, "numbers must hold 11 values, got 1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_say_what_must_hold(change, match):
    given = {
        "x": torch.zeros(5, 40), "xr": None, "xa": None, "adv": None, "bias": None,
        "ref_bias": None, "aux_bias": None, "targets": torch.zeros(5, dtype=torch.int64),
        "fields": torch.empty(4, 1, 5), "at": torch.zeros(3, 5, dtype=torch.float64),
        "keep": None, "v0": 0, "chunk": 40, "ignore": -100, "small": True, "rounds_to": 0,
        "plan": "logp;;;logits,targets", "numbers": [1.0, 0.0] * 5 + [0.0],
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=match):
        OPS.fold(**{**given, **change})
