"""README's first picture: drawn from the file of results, every right row in it, axes from 0."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from benchmarks.front import CASE, LEFT_OUT, WORDS, front
from benchmarks.results import LIMIT, read

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "linear_logps.csv"


def test_every_variant_is_drawn_as_it_was_measured(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    rows = read(RESULTS)
    assert front(rows, tmp_path) == tmp_path / "front.png"
    time, memory = drawn[0].axes
    want = {
        WORDS.get(r["variant"], r["variant"]): r
        for r in rows
        if r["case"] == CASE and r["status"] == "ok" and r["variant"] not in (LIMIT, *LEFT_OUT)
    }
    names = [label.get_text() for label in time.get_yticklabels()]
    assert set(names) == set(want) and len(names) > 8
    assert [bar.get_width() for bar in time.patches] == [float(want[n]["cpu_s"]) for n in names]
    peaks = [float(want[n]["peak_mib"]) for n in names if want[n]["peak_mib"]]
    assert [bar.get_width() for bar in memory.patches] == peaks
    for axes in (time, memory):
        assert axes.get_xlim()[0] == 0 and axes.get_xscale() == "linear"


def test_no_picture_without_a_memory_figure(tmp_path):
    rows = [r | {"peak_mib": ""} for r in read(RESULTS)]
    assert front(rows, tmp_path) is None and not list(tmp_path.iterdir())


def test_readme_shows_it():
    assert "](benchmarks/results/front.png)" in (ROOT / "README.md").read_text()
    assert (ROOT / "benchmarks" / "results" / "front.png").stat().st_size > 10_000
