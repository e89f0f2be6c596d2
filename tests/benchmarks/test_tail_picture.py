"""The picture of the cases with a tail: every measured point of the file is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from benchmarks.results import read
from benchmarks.tail import DTYPES, NAME, TAIL, tail

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "linear_logps.csv"


def test_every_point_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    rows = read(RESULTS)
    assert tail(rows, tmp_path) == tmp_path / NAME
    for axes, dtype in zip(drawn[0].axes, DTYPES, strict=True):
        want = {
            (float(r["share"]), float(r["ratio_cpu"]))
            for r in rows
            if r["dtype"] == dtype and r["variant"] == TAIL and r["case"].startswith("tail-")
        }
        lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
        assert len(lines) == 5
        assert {point for line in lines for point in zip(*line.get_data(), strict=True)} == want
        assert axes.get_ylim()[0] == 0


def test_no_picture_without_such_cases(tmp_path):
    rows = [r for r in read(RESULTS) if not r["case"].startswith("tail-")]
    assert tail(rows, tmp_path) is None and not list(tmp_path.iterdir())
