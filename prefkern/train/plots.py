"""PNG curves from log rows: loss, margins, accuracies, KL, log-probs of chosen and rejected.

Rows are dictionaries with TRL's keys ("loss", "rewards/margins", "eval_loss", ...) and "step", one
per line of a JSON-lines file. No display is needed: figures are drawn by Agg without pyplot, so
importing this module changes no global state of matplotlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .output import check_writable, writing

_SOURCE = "prefkern plot"  # in the text of a picture: such a one may be drawn again

Rows = Iterable[Mapping[str, Any]]

# Okabe and Ito's palette: distinct for the colour-blind and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))  # of the keys of one panel


class Panel(NamedTuple):
    stem: str  # file name without suffix
    title: str
    label: str  # of the y axis
    keys: tuple[tuple[str, str], ...]  # (key of the row, name in the legend)
    level: float | None = None  # a dotted line, where a level has a meaning
    limits: tuple[float, float] | None = None
    optional: bool = False  # its absence is not worth a note


PANELS = (
    Panel("loss", "Loss", "nats", (("loss", "loss"),)),
    Panel("margins", "Reward margin", "beta x nats", (("rewards/margins", "margin"),), 0.0),
    Panel(
        "accuracies",
        "Share ranked right",
        "share",
        (
            ("rewards/accuracies", "pairs"),
            ("rank/pair_accuracy", "pairs of a list"),
            ("rank/best_first", "best of a list"),
        ),
        0.5,
        (-0.02, 1.02),
    ),
    Panel(
        "kl",
        "KL(reference || policy) per answer",
        "nats",
        (("kl/chosen", "chosen"), ("kl/rejected", "rejected")),
        0.0,
    ),
    Panel(
        "logps",
        "Log-probability of an answer",
        "nats",
        (("logps/chosen", "chosen"), ("logps/rejected", "rejected"), ("logps/mean", "all")),
    ),
    Panel(
        "ranking",
        "Order within a list",
        "",
        (("rank/ndcg", "NDCG"), ("rank/kendall_tau", "Kendall tau")),
        optional=True,
    ),
)


class Plotted(NamedTuple):
    files: list[Path]
    notes: list[str]  # what could not be drawn or read, and why

    def __str__(self) -> str:
        return "\n".join([*(f"wrote {path}" for path in self.files), *self.notes])


class Curve(NamedTuple):
    run: str
    name: str
    held_out: bool
    steps: list[float]
    values: list[float]


def read_log(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a JSON-lines log, and notes on lines that are none.

    A run that was killed leaves a torn last line; it is skipped and noted.

    Raises:
        ValueError: The file is missing or holds no row at all.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no log file {path}; pass the JSON-lines file of a run.")
    rows, notes = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            notes.append(f"{path.name}:{number} is not a JSON row ({error}); skipped")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            notes.append(f"{path.name}:{number} holds no JSON object; skipped")
    if not rows:
        raise ValueError(f"{path} holds no log row: {'; '.join(notes) or 'the file is empty'}.")
    return rows, notes


def plot_history(
    runs: str | Path | Rows | Mapping[str, str | Path | Rows],
    out_dir: str | Path,
    *,
    panels: tuple[Panel, ...] = PANELS,
) -> Plotted:
    """Writes one PNG per panel that has data and, from two on, `curves.png` with all of them.

    Training rows are drawn as lines, evaluation rows (keys with the prefix `eval_`) as dashed lines
    with markers. A value that is not finite leaves a gap and is noted.

    Args:
        runs: A log file or its rows; or several, by the name that the legend is to show.
        out_dir: Folder for the pictures; made when missing.
        panels: What to draw.

    Returns:
        Plotted(files, notes). No files where no log has any of the panels' keys.

    Raises:
        ValueError: A log file is missing or holds no row.
    """
    if not isinstance(runs, Mapping):
        runs = {"": runs}
    logs: dict[str, list[Mapping[str, Any]]] = {}
    notes: list[str] = []
    for name, source in runs.items():
        if isinstance(source, str | Path):
            rows, found = read_log(source)
            logs[name] = [*rows]
            notes += found
        else:
            logs[name] = list(source)
    if len(logs) == 1:  # one run needs no name in every legend
        logs = {"": next(iter(logs.values()))}
    drawn = []
    for panel in panels:
        curves = [c for run, rows in logs.items() for c in _curves(run, rows, panel, notes)]
        if curves:
            drawn.append((panel, curves))
        elif not panel.optional:
            keys = ", ".join(key for key, _ in panel.keys)
            notes.append(f"{panel.stem}.png left out: no row has {keys}")
    if not drawn:  # a run is not to fail at its end for a log without numbers
        return Plotted([], notes)
    out_dir = Path(out_dir)
    check_writable(out_dir)
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    files = [_write([item], out_dir / f"{item[0].stem}.png", columns=1) for item in drawn]
    if len(drawn) > 1:
        files.append(_write(drawn, out_dir / "curves.png", columns=min(3, len(drawn))))
    return Plotted(files, notes)


_WIDEST = 1e150  # an axis from -1e308 to 1e308 has no width


def _curves(run: str, rows: list[Mapping[str, Any]], panel: Panel, notes: list[str]) -> list[Curve]:
    curves = []
    for key, name in panel.keys:
        for held_out in (False, True):
            full = "eval_" + key if held_out else key
            steps, values, lost, unplaced = [], [], 0, 0
            for index, row in enumerate(rows):
                value, step = _number(row.get(full)), _number(row.get("step", index))
                if value is None:
                    continue
                if step is None or not math.isfinite(step):
                    unplaced += 1
                    continue
                steps.append(step)
                values.append(value if math.isfinite(value) else math.nan)
                lost += not math.isfinite(value)
            where = f" of {run}" if run else ""
            if unplaced:
                notes.append(f"{full}{where}: {unplaced} rows without a step are left out")
            if lost:
                notes.append(f"{full}{where}: {lost} of {len(values)} values are not finite")
            if len(values) > lost:
                curves.append(Curve(run, name, held_out, steps, values))
    return curves


def _number(value: Any) -> float | None:
    """A number as a float, infinite beyond what an axis can span; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if abs(value) > _WIDEST:
        return math.inf if value > 0 else -math.inf
    return float(value)


def _write(items: list[tuple[Panel, list[Curve]]], path: Path, columns: int) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(items) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (panel, curves) in zip(grid, items, strict=False):
        _draw(axes, panel, curves)
    for axes in grid[len(items) :]:
        axes.set_axis_off()
    if path.exists() and _SOURCE.encode() not in path.read_bytes()[:4096]:
        raise ValueError(
            f"{path} is no picture of prefkern plot and is not replaced; move it away."
        )
    # Without the software entry the same rows give the same bytes under every version.
    with writing(path):
        figure.savefig(path, metadata={"Software": None, "Source": _SOURCE})
    return path


def _draw(axes: Any, panel: Panel, curves: list[Curve]) -> None:
    runs = list(dict.fromkeys(curve.run for curve in curves))
    keys = list(dict.fromkeys(curve.name for curve in curves))
    several = len(runs) > 1
    for curve in curves:
        # one run: a colour per key; several: a colour per run and a dash pattern per key
        key, run = keys.index(curve.name), runs.index(curve.run)
        # A short run has few points: without markers a single one would be invisible.
        marked = curve.held_out or len(curve.steps) < 20
        axes.plot(
            curve.steps,
            curve.values,
            linestyle=_DASHES[key % len(_DASHES)] if several else "--" if curve.held_out else "-",
            color=COLOURS[(run if several else key) % len(COLOURS)],
            linewidth=1.0 if several and curve.held_out else 1.6,
            alpha=1.0 if curve.held_out else 0.75,
            marker="o" if marked else None,
            markersize=4,
            markerfacecolor="white" if several and curve.held_out else None,
        )
    if panel.level is not None:
        axes.axhline(panel.level, color="0.5", linestyle=":", linewidth=1)
    if panel.limits is not None and all(
        panel.limits[0] <= v <= panel.limits[1] for c in curves for v in c.values if v == v
    ):
        axes.set_ylim(*panel.limits)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.label)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curves) > 1:
        handles = _legend(axes, runs, keys, curves) if several else axes.lines[: len(curves)]
        words = [handle.get_label() for handle in handles]
        if not several:
            words = [f"{c.name} (held out)" if c.held_out else c.name for c in curves]
        # One share and its held-out twin gather at the top; elsewhere matplotlib finds the emptiest
        # place, and where there is none, the ground keeps the words legible.
        place = "lower right" if panel.limits and len(keys) == 1 else "best"
        axes.legend(handles, words, fontsize=8, loc=place, framealpha=0.8, edgecolor="none")


def _legend(axes: Any, runs: list[str], keys: list[str], curves: list[Curve]) -> list[Any]:
    """What a colour, a dash pattern and a marker mean, once each."""
    from matplotlib.lines import Line2D

    found = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], label=run) for i, run in enumerate(runs)
    ]
    if len(keys) > 1:
        for i, key in enumerate(keys):
            found.append(
                Line2D([], [], color="0.4", linestyle=_DASHES[i % len(_DASHES)], label=key)
            )
    if len({curve.held_out for curve in curves}) > 1:
        found.append(
            Line2D([], [], color="0.4", lw=1, marker="o", markersize=4, markerfacecolor="white",
                   label="held out")
        )  # fmt: skip
    return found
