"""Curves: what is drawn, what is noted, and that the pictures show the data."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.image import imread

from prefkern.train.plots import COLOURS, PANELS, Panel, plot_history, read_log

KEYS = [key for panel in PANELS if not panel.optional for key, _ in panel.keys[:1]]


def rows(count=30, start=0.0):
    out = []
    for step in range(1, count + 1):
        row = {key: start + step / count for key in KEYS}
        out.append({"step": step, **row, "logps/rejected": -step / count, "kl/rejected": 2.0})
        if step % 10 == 0:
            held_out = {f"eval_{key}": 0.5 for key in (*KEYS, "logps/rejected")}
            out.append({"step": step, **held_out})
    out.append({"train_loss": 0.5, "step": count})
    return out


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def colours_of(path):
    image = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    packed = np.unique(image @ (65536, 256, 1))
    return {(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in packed}


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_one_picture_per_panel_and_one_of_all(tmp_path):
    found = plot_history(write(tmp_path / "log.jsonl", rows()), tmp_path / "out")
    stems = ["loss", "margins", "accuracies", "kl", "logps", "curves"]
    assert [path.name for path in found.files] == [f"{stem}.png" for stem in stems]
    assert found.notes == []
    for path in found.files:
        image = imread(path)
        assert image.shape[0] > 400 and image.shape[1] > 600
        # Marks of the held-out curve are drawn in full colour over the background.
        assert rgb(COLOURS[0]) in colours_of(path), path.name
    assert rgb(COLOURS[1]) in colours_of(tmp_path / "out" / "curves.png")
    assert "wrote" in str(found) and "loss.png" in str(found)


def test_same_rows_same_bytes(tmp_path):
    first = plot_history(rows(), tmp_path / "a").files
    second = plot_history(rows(), tmp_path / "b").files
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_several_runs_on_one_picture(tmp_path):
    runs = {"dpo": write(tmp_path / "a.jsonl", rows()), "tdpo2": rows(start=1.0)}
    found = plot_history(runs, tmp_path)
    assert {rgb(COLOURS[0]), rgb(COLOURS[1])} <= colours_of(tmp_path / "loss.png")
    assert len(found.files) == 6


def test_missing_keys_and_values_are_noted(tmp_path):
    some = [{"step": i, "loss": math.nan if i == 3 else 1.0, "epoch": True} for i in range(6)]
    found = plot_history(some, tmp_path)
    assert [path.name for path in found.files] == ["loss.png"], "no overview of a single panel"
    assert "loss: 1 of 6 values are not finite" in found.notes
    assert any(note.startswith("kl.png left out: no row has kl/chosen") for note in found.notes)
    assert not any("ranking" in note for note in found.notes)
    nothing = plot_history([{"step": 1, "loss": math.inf}], tmp_path / "none")
    assert nothing.files == [] and not (tmp_path / "none").exists()


def test_lists_have_their_own_panels(tmp_path):
    some = [{"step": i, "rank/ndcg": 0.5, "rank/kendall_tau": -0.2} for i in range(3)]
    assert [p.name for p in plot_history(some, tmp_path).files] == ["ranking.png"]


def test_torn_log_is_read_as_far_as_it_goes(tmp_path):
    path = write(tmp_path / "log.jsonl", rows(5))
    path.write_bytes(path.read_bytes() + b"[1]\n\xff\n\n" + b'{"step": 6, "lo')
    found, notes = read_log(path)
    assert len(found) == 6
    assert [note.split(" ")[0] for note in notes] == [f"log.jsonl:{n}" for n in (7, 8, 10)]


def test_missing_and_empty_logs(tmp_path):
    with pytest.raises(ValueError, match="there is no log file"):
        plot_history(tmp_path / "nowhere.jsonl", tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no log row: the file is empty"):
        plot_history(tmp_path / "empty.jsonl", tmp_path)


def test_own_panels_and_a_single_point(tmp_path):
    panel = Panel("mine", "Mine", "share", (("x", "x"),), 0.5, (0.0, 1.0))
    found = plot_history([{"step": 0, "x": 0.3}], tmp_path, panels=(panel,))
    assert [p.name for p in found.files] == ["mine.png"]
    ink = [c for c in colours_of(tmp_path / "mine.png") if c[2] > c[0] + 60]
    assert ink, "one point is drawn as a marker"


def test_pyplot_is_left_alone(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from prefkern.train.plots import plot_history; "
        f"plot_history([{{'step': 1, 'loss': 1.0}}], {str(tmp_path)!r}); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
