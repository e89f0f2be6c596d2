"""Which rows and columns a backward with a tail multiplies together, on the Triton backend."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP32, Regime, backends_on, upstream_for
from op_checks import inputs_of, run_op

from prefkern.backends import memory, tables
from prefkern.backends.tiled import tiling, units

interpreted = pytest.mark.skipif("triton" not in backends_on(), reason="the triton backend is off")


@interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("needed", [("hidden", "weight"), ("hidden",), ("weight",)], ids="-".join)
@pytest.mark.parametrize("tiles", [3, 5])  # of two chunks and all rows, or of one and 16
def test_units_of_a_tail_chunk_by_chunk_and_tile_by_tile(dtype, needed, tiles, monkeypatch):
    """Which rows are multiplied together is a matter of time alone; where the host must not wait,
    under capture, all of them are, and a dx of 0 stands for skipped units."""
    monkeypatch.setattr(tables, "CHUNK", 128)
    limit = 120_000 if tiles == 3 else 1024
    monkeypatch.setattr(memory, "tile_bytes", lambda device: limit)
    monkeypatch.setattr(tiling, "ROW_ALIGN", 16)
    regime = Regime("tail", N=40, V=600, D=12)
    inputs = inputs_of("linear_divergence", regime, dtype, lean=3.0)
    stats, found, taken = ("logp", "fkl"), {}, []
    upstream = upstream_for(stats, regime.N, dtype)
    pieces = units.Units.pieces

    def watched(self):
        for piece in pieces(self):
            taken.append(piece)
            yield piece

    def run(each: float, *, wait: bool = True):
        taken.clear()
        monkeypatch.setattr(units, "PIECE", each)
        with monkeypatch.context() as patch:
            if not wait:
                patch.setattr(units, "counts_of", lambda *_: None)
            return run_op("triton", inputs, stats, upstream, wanted=needed, tail_mass=0.1)[1]

    monkeypatch.setattr(units.Units, "pieces", watched)
    found["chunks"] = run(0.0)
    assert len(taken) == 5 and all(p.skipped is None for p in taken)
    assert any(p.rows is not None for p in taken)
    found["tiles"] = run(1e12)
    assert len(taken) == tiles
    assert any(p.plan.rows < p.m if tiles == 5 else p.skipped is not None for p in taken)
    found["all rows"] = run(0.0, wait=False)
    assert all(p.rows is None and p.skipped is not None for p in taken)
    _, whole = run_op("triton", inputs, stats, upstream, wanted=needed)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is FP32 else {"rtol": 2e-2, "atol": 2e-2}
    for name in needed:
        for way in ("tiles", "all rows"):
            torch.testing.assert_close(found[way][name], found["chunks"][name], **close)
        assert not torch.equal(found["chunks"][name], whole[name])


@pytest.mark.parametrize("each", [0.0, 5.0, 1e6])
def test_the_pieces_of_a_tail_are_the_cheapest(each):
    """Of all ways to halve a tile, by counts of the rows that are active in a group of chunks."""
    active = torch.rand(13, 9, generator=torch.Generator().manual_seed(3)) < 0.3
    active[4:6] = False
    counts = units.counts_of(active, 8)

    def cost(pieces):
        return sum(len(p) * int(active[p.start : p.stop].any(0).sum()) + each for p in pieces)

    def ways(chunks, width):
        yield [chunks]
        if width > 1 and len(chunks) > 1:
            for left in ways(chunks[: width // 2], width // 2):
                if len(chunks) <= width // 2:
                    yield left
                    continue
                for right in ways(chunks[width // 2 :], width // 2):
                    yield left + right

    for tile in (range(0, 8), range(8, 13)):
        total, found = units.split(tile, 8, counts, each)
        assert [c for chunks, _ in found for c in chunks] == list(tile)
        assert all(rows == int(active[p.start : p.stop].any(0).sum()) for p, rows in found)
        assert total == cost([p for p, _ in found]) == min(map(cost, ways(tile, 8)))
