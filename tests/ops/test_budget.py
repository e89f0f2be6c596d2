"""Rows of logits kept for a backward: within the budget, whole, and padded on a GPU alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from closeness import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import prefkern
from prefkern.backends import memory
from prefkern.backends.tiled.tiling import Kept, TileRange, Tiling, make_tiling
from prefkern.ops import budget

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize("v", [50_257, 32_001, 152_064, 7])
@pytest.mark.parametrize("bytes_per_logit", [2, 8])
def test_bytes_stay_within_the_budget(v, bytes_per_logit):
    for given in (0, v * bytes_per_logit - 1, 10 * v * bytes_per_logit + 5, 1 << 30):
        for device in (CPU, GPU):
            kept = budget.rows_kept(1000, v, bytes_per_logit, given, device)
            # rounding up to a whole row of V is all that a GPU's cache may add
            over = 0 if device == CPU else v * bytes_per_logit
            assert 0 <= kept * v * bytes_per_logit <= given + over
    assert budget.rows_kept(1000, v, bytes_per_logit, 1 << 40, CPU) == 1000


@pytest.mark.parametrize("v", [50_257, 32_001, 152_064])
def test_a_budget_for_everything_keeps_the_one_tile_of_a_ragged_vocabulary(v):
    """Rows of a tile are padded; a cache of rows x V logits alone would never hold it."""
    rows = 40
    kept = budget.rows_kept(rows, v, 2, 1 << 30, GPU)
    plan = Tiling(rows, v, rows, v)
    cache = torch.empty(kept * v, dtype=torch.bfloat16)
    assert Kept(plan, 1, cache).place(TileRange(0, rows, 0, v)) is not None


def test_a_budget_of_four_tiles_keeps_four():
    """Rounded down to whole rows of V it would hold three."""
    plan = make_tiling(8192, 152_064, 2, 4096, 256 * MIB)
    kept = budget.rows_kept(8192, 152_064, 2, GIB, GPU)
    cache = Kept(plan, 1, torch.empty(kept * 152_064, dtype=torch.bfloat16, device="meta"))
    steps = [step for v0 in plan.tiles() for step in plan.steps(v0)]
    assert len(steps) == 10 and [bool(cache.place(s)) for s in steps] == [True] * 4 + [False] * 6


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        assert budget.rows_kept(10, 100, 4, None, CPU) == 0


# ---- the table of devices


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(bytes, ...)`: machines with GPUs of that memory; the list of those asked."""
    asked = []

    def build(*sizes):
        def properties(index):
            asked.append(index)
            return SimpleNamespace(total_memory=sizes[index])

        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        memory._row_at.cache_clear()
        return asked

    yield build
    memory._row_at.cache_clear()


def at(index):
    return torch.device("cuda", index)


def test_a_gpu_is_asked_for_its_memory_once(gpus):
    """Bytes as drivers state them: H200 and B200; H100 and A100 of 80 GB, H100 NVL; A100 of 40 GB,
    L4, a half of an H100."""
    large, middle = (
        (150_120_000_000, 191_500_000_000),
        (84_930_000_000, 85_500_000_000, 99_900 * MIB),
    )
    small = (42_410_000_000, 23_600_000_000, 42_200 * MIB)
    asked = gpus(*large, *middle, *small)
    rows = [(8 * GIB, GIB)] * 2 + [(4 * GIB, GIB)] * 3 + [(GIB, 256 * MIB)] * 3
    for _ in range(2):
        found = [(memory.default_budget(at(i)), memory.tile_bytes(at(i))) for i in range(8)]
        assert found == rows
    assert asked == list(range(8))


def test_other_devices_have_rows_without_being_asked(gpus):
    asked = gpus()
    rows = {"cpu": 512 * MIB, "meta": 256 * MIB, "xpu": 256 * MIB, "mps": 256 * MIB}
    for kind, bytes_kept in rows.items():
        assert memory.default_budget(torch.device(kind)) == bytes_kept
        assert memory.tile_bytes(torch.device(kind)) == 256 * MIB
    assert memory.default_budget(GPU) == GIB  # without an index it names no device
    assert not asked


@pytest.mark.parametrize("error", [AssertionError("no CUDA"), RuntimeError("no driver")])
def test_a_device_that_cannot_be_asked_takes_the_smallest_row(error, monkeypatch):
    def refuse(index):
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    memory._row_at.cache_clear()
    assert (memory.default_budget(at(3)), memory.tile_bytes(at(3))) == (GIB, 256 * MIB)
    memory._row_at.cache_clear()


def test_free_memory_is_never_read(gpus, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("free memory was read")

    gpus(85_000_000_000)
    for name in ("mem_get_info", "memory_allocated", "memory_reserved", "memory_stats"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert memory.default_budget(at(0)) == 4 * GIB
    assert budget.rows_kept(1000, 152_064, 2, None, at(0)) == 1000


def test_the_device_of_fake_tensors_decides(gpus):
    """Tensors of a trace: nothing lies on the device, its memory counts all the same."""
    gpus(85_000_000_000, 24_000_000_000)
    n, v = 100_000, 152_064
    with FakeTensorMode():
        found = [
            budget.rows_kept(n, v, 2, None, torch.empty(1, device=at(i)).device) for i in (0, 1)
        ]
    assert found == [4 * GIB // (2 * v) + 1, GIB // (2 * v) + 1]  # rounded up


def test_under_compile_it_is_a_constant_of_the_graph(gpus):
    gpus(85_000_000_000, 24_000_000_000)

    def rows(x, device):
        return x.new_zeros(budget.rows_kept(10**6, 152_064, 2, None, device))

    compiled = torch.compile(rows, fullgraph=True, backend="eager")
    for device, size in ((at(0), 4 * GIB), (at(1), GIB), (at(0), 4 * GIB), (CPU, 512 * MIB)):
        over = 0 if device == CPU else 1  # rounded up
        assert compiled(torch.zeros(1), device).shape == (size // (2 * 152_064) + over,)


def test_the_default_changes_no_bit_of_a_result(monkeypatch):
    """None, some and all of the logits kept, by the table alone."""
    g = torch.Generator().manual_seed(0)
    n, v, d = 70, 301, 24
    hidden, ref = (torch.randn(n, d, generator=g) for _ in range(2))
    weight, ref_weight = (torch.randn(v, d, generator=g) for _ in range(2))
    targets = torch.randint(0, v, (n,), generator=g)
    runs, kept = [], []
    for size in (0, 30 * 2 * 4 * v, GIB):
        monkeypatch.setattr(memory, "TABLE", (memory.Row("", 0, size, 256 * MIB),))
        memory._row_at.cache_clear()
        kept.append(budget.rows_kept(n, v, 8, None, CPU))
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = prefkern.linear_divergence(*leaves, targets, ref, ref_weight)
        total = (out.logp - 2 * out.ref_logp + out.fkl.square()).sum()
        runs.append((out.logp, out.fkl, *torch.autograd.grad(total, leaves)))
    memory._row_at.cache_clear()
    assert kept == [0, 30, n]
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert_same_bits(a, b)
