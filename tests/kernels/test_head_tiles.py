"""The head ops on many small tiles: what one tile of the regimes in tests/ops never crosses.

tests/ops runs the Triton backend as well, on shapes of one tile; here the tile bytes are cut down
until rows, vocabulary and chunks all come in several pieces with a ragged last one.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    ONE_MODEL,
    OPTIONS,
    TWO_MODEL,
    Regime,
    backends_on,
    upstream_for,
)
from closeness import assert_same_bits
from op_checks import check_closeness, check_masked_rows, inputs_of, run_op, stats_of
from oracles import top_k
from prefkern.kernels.epilogue import KERNELS, Kernels
from tile_calls import sweep_of

import prefkern
from prefkern.backends import memory, tables
from prefkern.backends.contract import Model
from prefkern.backends.tiled import operands, tiles, tiling, topset
from prefkern.backends.tiled.epilogue import LogitOptions, ProductTile
from prefkern.backends.tiled.topset import TopSet

pytestmark = pytest.mark.skipif("triton" not in backends_on(), reason="the triton backend is off")

# about 38 of 56 rows are scored; with chunks of 128 columns the vocabulary is 3 tiles
TILES = Regime("tiles", N=56, V=300, D=12)
FROZEN = ("logp", "lse", "zy", "ent", "top1")
FROZEN_TWO = ("logp", "ref_logp", "fkl", "rkl", "ent")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of one chunk of 128 columns and 16 or 32 rows."""
    monkeypatch.setattr(Kernels, "chunk_columns", lambda self, sweep: 128)
    monkeypatch.setattr(memory, "tile_bytes", lambda device: 1024)
    monkeypatch.setattr(tiling, "ROW_ALIGN", 16)
    plans: list[tiling.Tiling] = []
    made = operands.make_tiling

    def spy(*args, **more):
        plans.append(made(*args, **more))
        return plans[-1]

    monkeypatch.setattr(operands, "make_tiling", spy)
    yield plans
    assert plans and all(len(p.tiles()) > 1 for p in plans)


def one_and_two(dtypes):
    return pytest.mark.parametrize(
        ("op", "dtype"),
        list(itertools.product(("linear_logps", "linear_divergence"), dtypes)),
        ids=str,
    )


@one_and_two((FP32, BF16, FP16, FP64))
def test_several_row_blocks_and_tiles(op, dtype, small_tiles):
    inputs = inputs_of(op, TILES, dtype, option=OPTIONS[-1])
    check_closeness("triton", inputs, stats_of(op), option=OPTIONS[-1])
    assert all(len(p.row_blocks()) > 1 for p in small_tiles)


@one_and_two((FP32, BF16))
def test_several_tiles_of_a_frozen_head(op, dtype, small_tiles):
    """The running maxima move from tile to tile, and the sums of head rows with them."""
    stats = FROZEN if op == "linear_logps" else FROZEN_TWO
    option = OPTIONS[4] if dtype is FP32 else OPTIONS[0]
    inputs = inputs_of(op, TILES, dtype, option=option)
    check_closeness("triton", inputs, stats, option=option, wanted=("hidden",))


# what a backward reads: rounded products of the policy, unrounded ones of one model, of both
READS = (("logp", "ref_logp"), ("logp", "ent", "top1"), ("logp", "fkl", "tv"))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("stats", READS, ids="+".join)
def test_the_budget_changes_no_bit_and_keeps_whole_tiles(stats, dtype, small_tiles, monkeypatch):
    """None, some and all tiles kept; products are counted to see that tiles really were kept."""
    inputs = inputs_of("linear_divergence", TILES, dtype)
    upstream = upstream_for(stats, TILES.N, dtype)
    counts = []
    made = tiles._multiply

    def counted(*args):
        counts[-1] += 1
        return made(*args)

    monkeypatch.setattr(tiles, "_multiply", counted)
    runs = []
    for rows in (0, 20, 200):
        counts.append(0)
        # a budget of 200 rows would be cut to the scored ones, which a ragged tile overflows
        monkeypatch.setattr(prefkern.ops.budget, "rows_kept", lambda *_, b=rows: b)
        runs.append(run_op("triton", inputs, stats, upstream))
    for got in runs[1:]:
        for part, first in zip(got, runs[0], strict=True):
            for name in part:
                assert_same_bits(part[name], first[name], name)
    pieces = len(small_tiles[0].tiles()) * len(small_tiles[0].row_blocks())
    none, some, all_ = counts
    # a backward that reads the policy alone neither keeps nor makes the reference's products
    read = 2 if "fkl" in stats else 1
    again = 2 if "tv" in stats else 0  # the second sweep reads kept tiles too
    assert none == pieces * (2 + read + again)
    assert all_ == pieces * 2
    assert none > some > all_


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_third_head_beside_kept_tiles(dtype):
    """It is never kept, and made again for the backward."""
    n, v, d = 6, 48, 8  # a width that 16 divides: the tile fits the rows that are kept
    hidden, ref, aux = (torch.randn(n, d).to(dtype) for _ in range(3))
    weight, ref_weight, aux_weight = (torch.randn(v, d).to(dtype) for _ in range(3))
    runs = []
    for budget in (0, None):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = prefkern.linear_divergence(
            *leaves, torch.arange(n), ref, ref_weight, aux_hidden=aux, aux_head=aux_weight,
            stats=("ev",), memory_budget=budget, backend="triton",
        )  # fmt: skip
        runs.append(torch.autograd.grad(out.ev.sum(), leaves))
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)


def test_a_second_backward_gives_the_same_bits(small_tiles):
    """dz never goes over a kept tile."""
    for op, dtype in itertools.product(("linear_logps", "linear_divergence"), (FP32, BF16)):
        inputs = inputs_of(op, TILES, dtype)
        leaf = inputs.hidden.clone().requires_grad_()
        weight = inputs.weight.clone().requires_grad_()
        if op == "linear_logps":
            out = prefkern.linear_logps(leaf, weight, inputs.targets, backend="triton")
        else:
            out = prefkern.linear_divergence(
                leaf, weight, inputs.targets, inputs.ref_hidden, inputs.ref_weight,
                backend="triton",
            )  # fmt: skip
        first = torch.autograd.grad(out.logp.sum(), (leaf, weight), retain_graph=True)
        again = torch.autograd.grad(out.logp.sum(), (leaf, weight))
        for a, b in zip(first, again, strict=True):
            assert_same_bits(a, b, f"{op} {dtype}")


@pytest.mark.parametrize("op", ["linear_logps", "linear_divergence"])
def test_masking_instead_of_compaction(op, small_tiles, monkeypatch):
    """Under graph capture no row is dropped: the kernels skip ignored rows, whatever they hold."""
    monkeypatch.setattr(prefkern.ops.linear_stats, "scored_rows", lambda *_: None)
    inputs = inputs_of(op, TILES, FP32)
    inputs.hidden[inputs.targets < 0] = float("nan")
    check_closeness("triton", inputs, stats_of(op))
    check_closeness("triton", inputs, ("logp", "ent"), wanted=("hidden",))


def test_masked_rows_stay_out_of_every_tile(small_tiles):
    inputs = inputs_of("linear_divergence", TILES, BF16)
    check_masked_rows("triton", inputs, ("logp", "fkl", "jsd:0.3", "bkl:3"), float("inf"))


def test_equal_models_are_exactly_0_apart(small_tiles):
    inputs = inputs_of("linear_divergence", TILES, BF16)
    copy = inputs.replace(ref_hidden=inputs.hidden, ref_weight=inputs.weight.clone(), values=None)
    stats = ("fkl", "rkl", "jsd:0.3", "alpha:0.4", "renyi:0.6", "tv", "bkl:3")
    for same in (copy, copy.replace(ref_weight=copy.weight)):
        values, _ = run_op("triton", same, stats, None)
        for stat, value in values.items():
            assert bool((value == 0).all()), f"{stat}: {value.abs().max()}"


def test_tiles_stay_below_their_bytes():
    """The plan at real shapes: tiles within their bytes, the whole vocabulary and all rows."""
    limits = sorted({r.tiles for r in memory.TABLE})
    assert limits == [256 << 20, 1 << 30]
    for m, v, size, chunk, limit, even in itertools.product(
        (1, 2048, 8192, 8757, 65536, 200_000), (5, 32003, 50257, 151936, 256000),
        (2, 4, 6, 10, 14, 24), (1024, 2048, 4096), limits, (False, True),
    ):  # fmt: skip
        p = tiling.make_tiling(m, v, size, chunk, limit, even=even)
        assert p.largest * size <= limit
        assert p.columns == v or p.columns % chunk == 0
        assert p.rows == m or p.rows % tiling.ROW_ALIGN == 0
        steps = [s for v0 in p.tiles() for s in p.steps(v0)]
        assert sum(s.m * s.w for s in steps) == m * v
        if even:  # no more tiles than as wide ones as may be, of widths a few chunks apart
            wide = tiling.make_tiling(m, v, size, chunk, limit, even=False)
            assert p.rows == wide.rows and len(p.tiles()) == len(wide.tiles())
            spare = len(p.tiles()) * p.columns - v
            assert spare < len(p.tiles()) * chunk
    # one block of rows where that is cheaper, square tiles where there are many rows
    quarter, whole = limits
    assert tiling.make_tiling(8192, 151936, 2, 4096, quarter)[2:] == (8192, 16384)
    assert tiling.make_tiling(65536, 151936, 10, 2048, quarter)[2:] == (5120, 4096)
    assert tiling.make_tiling(8192, 151936, 2, 4096, whole)[2:] == (8192, 53248)
    # a row block less high, where all rows of one chunk would be too much
    assert tiling.make_tiling(8192, 151936, 10, 4096, quarter)[2:] == (4096, 4096)


def test_kept_tiles_do_not_overlap():
    p = tiling.Tiling(M=70, V=300, rows=32, columns=128)
    size = sum(s.m * s.stride for v0 in p.tiles() for s in p.steps(v0))
    cache = torch.zeros(2 * size)
    kept = tiling.Kept(p, 2, cache)
    for v0 in p.tiles():
        for step in p.steps(v0):
            for view in kept.place(step):
                view += 1
    assert cache.max() == 1
    assert cache.sum() == 2 * 70 * 300
    last = list(p.steps(256))[-1]
    assert tiling.Kept(p, 2, cache[:-1]).place(last) == []


@pytest.mark.parametrize("k", [1, 7, 40])
def test_the_top_set_takes_the_lower_of_equal_columns(k, monkeypatch):
    """Few distinct values, some of them -inf, in tiles narrower than k."""
    z = torch.randint(-2, 3, (31, 90), generator=torch.Generator().manual_seed(k)).double()
    z[z == -2] = float("-inf")
    top = TopSet(31, k, FP64, torch.device("cpu"))
    monkeypatch.setattr(topset, "CHUNK", 24 * 20)  # 20 rows of a tile at a time
    for v0 in range(0, 90, 24):
        top.add(z[:, v0 : v0 + 24], LogitOptions(1.0, 0.0, 0.0, None), v0)
    order = np.argsort(-z.numpy(), axis=1, kind="stable")[:, :k]
    assert np.array_equal(top.members[1].numpy().T, order)
    value, column = top.members[:, -1]
    inside = (z > value[:, None]) | ((z == value[:, None]) & (torch.arange(90) <= column[:, None]))
    want = np.stack([top_k(row, k) for row in z.numpy()])
    assert np.array_equal(inside.numpy(), want)


def test_repeated_columns_of_sparse_values_add_up(small_tiles):
    """A column named three times counts with the sum, in value and gradient."""
    inputs = inputs_of("linear_divergence", TILES, FP32)
    index = torch.randint(0, TILES.V, (TILES.N, 4))
    index[:, 1] = index[:, 0]
    index[::2, 3] = index[::2, 0]
    value = torch.randn(TILES.N, 4)
    found = []
    for backend in ("triton", "eager"):
        leaf = inputs.hidden.clone().requires_grad_()
        ev = prefkern.linear_divergence(
            leaf, inputs.weight, inputs.targets, inputs.ref_hidden, inputs.ref_weight,
            values=(index, value), stats=("ev",), backend=backend,
        ).ev  # fmt: skip
        found.append((ev, torch.autograd.grad(ev.sum(), leaf)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_a_stated_count_of_rows(small_tiles):
    inputs = inputs_of("linear_logps", TILES, FP32)
    count = int((inputs.targets >= 0).sum())
    upstream = upstream_for(ONE_MODEL, TILES.N, FP32)
    want = run_op("triton", inputs, ONE_MODEL, upstream)
    got = run_op("triton", inputs, ONE_MODEL, upstream, num_scored=count)
    for a, b in zip(got, want, strict=True):
        for name in a:
            assert_same_bits(a[name], b[name], name)


def test_rows_further_apart_than_2_to_31_elements():
    """Offsets are 64-bit. The pages between the rows are never touched, so they take no memory."""
    w, stride = 40, (1 << 31) + 16
    y = torch.tensor([3, 39])
    near = torch.randn(2, w).bfloat16()
    sweep = sweep_of(("logp",), y, Model(logits=near))
    far = torch.empty(stride + w, dtype=BF16).as_strided((2, w), (stride, 1))
    found = []
    for z in (near, far.copy_(near)):
        chunks = -(-w // KERNELS.chunk_columns(sweep))
        fields = torch.zeros(sweep.fields, chunks, 2)
        at = torch.zeros(len(tables.AT), 2, dtype=FP64)
        KERNELS.fold(sweep, ProductTile(0, 0, (z,)), fields, at, None)
        coefficients = torch.full((len(tables.COEFFICIENTS), 2), 0.5)
        KERNELS.gradient(sweep, ProductTile(0, 0, (z,)), coefficients, z)
        found.append((fields, at, z.clone()))
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


def test_shared_heads_cast_one_tile_of_weights():
    """A head in another dtype is cast once per tile, also when both models use it."""
    inputs = inputs_of("linear_divergence", TILES, BF16, weight_dtype=FP32, shared=True)
    check_closeness("triton", inputs, [s for s in TWO_MODEL if s != "ev"])


def test_one_row_and_several_tiles(small_tiles):
    """dH [1, D] is summed over tiles: a product whose sum has one row."""
    for op, dtype in itertools.product(("linear_logps", "linear_divergence"), (FP32, BF16)):
        inputs = inputs_of(op, Regime("one", N=1, V=300, D=12, ignored="none"), dtype)
        check_closeness("triton", inputs, stats_of(op))


def test_a_target_that_no_column_has(small_tiles, monkeypatch):
    """NaN, and no at-target of another column; CPUs refuse such labels before."""
    monkeypatch.setattr(prefkern.checks, "check_target_range", lambda *_: None)
    inputs = inputs_of("linear_divergence", TILES, FP32)
    good = inputs.targets.clone()
    rows = (good >= 0).nonzero().flatten()[:4]
    bad = torch.tensor([TILES.V, TILES.V + 5, -7, 1 << 40])
    inputs.targets[rows] = bad
    stats = ("logp", "ref_logp", "lse", "ent", "fkl", "mix:0.25")
    values, _ = run_op("triton", inputs, stats, None)
    right, _ = run_op("triton", inputs.replace(targets=good), stats, None)
    for name in stats:
        assert values[name][rows].isnan().all(), name
        others = torch.ones(TILES.N, dtype=torch.bool).index_fill_(0, rows, False)
        assert_same_bits(values[name][others], right[name][others], name)


@pytest.mark.parametrize("wrong", [-3, 5])
def test_a_wrong_count_of_rows_gives_nan(wrong, small_tiles, monkeypatch):
    """Rows would be missing or counted twice; a device is not read to see which."""
    monkeypatch.setattr(prefkern.checks, "check_num_scored", lambda *_: None)
    inputs = inputs_of("linear_logps", TILES, FP32)
    count = int((inputs.targets >= 0).sum())
    values, _ = run_op("triton", inputs, ("logp", "ent"), None, num_scored=count + wrong)
    for value in values.values():
        assert value.isnan().all()


def test_a_third_head_beside_a_teacher(small_tiles):
    """ev reads the third head, xent the given values, in one call."""
    inputs = inputs_of("linear_divergence", TILES, FP64)
    g = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(TILES.V, generator=g)[:5] for _ in range(TILES.N)])
    q = torch.rand(TILES.N, 5, dtype=FP64, generator=g)
    aux = torch.randn(TILES.N, 7, dtype=FP64, generator=g)
    head = prefkern.Head(
        torch.randn(TILES.V, 7, dtype=FP64, generator=g), torch.randn(TILES.V, generator=g),
        softcap=4.0, temperature=1.3,
    )  # fmt: skip
    found = []
    for backend in ("triton", "eager"):
        leaf = inputs.hidden.clone().requires_grad_()
        out = prefkern.linear_divergence(
            leaf, inputs.weight, inputs.targets, inputs.ref_hidden, inputs.ref_weight,
            aux_hidden=aux, aux_head=head, values=(index, q), stats=("ev", "xent", "fkl"),
            backend=backend,
        )  # fmt: skip
        (out.ev + 2 * out.xent + out.fkl).sum().backward()
        found.append((out.ev, out.xent, out.fkl, leaf.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stat", ["ev", "xent"])
def test_an_entry_of_given_values_that_no_column_has(stat, small_tiles, monkeypatch):
    monkeypatch.setattr(prefkern.checks, "check_index_range", lambda *_: None)
    inputs = inputs_of("linear_logps", TILES, FP32)
    row = int((inputs.targets >= 0).nonzero()[0])
    index = torch.arange(3).expand(TILES.N, 3).clone()
    index[row, 1] = TILES.V
    value = torch.rand(TILES.N, 3)
    out = prefkern.linear_logps(
        inputs.hidden, inputs.weight, inputs.targets, values=(index, value), stats=(stat,),
        backend="triton",
    )  # fmt: skip
    found = getattr(out, stat)
    assert found.isnan().nonzero().flatten().tolist() == [row]
