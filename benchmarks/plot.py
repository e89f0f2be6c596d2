"""Pictures of the CSV files: `python -m benchmarks.plot results/linear_logps.csv ...`.

No measuring here. Figures are drawn by Agg without pyplot, so no display is needed.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS, PEER, LIMIT_COLOUR, SECOND = "#0072B2", "#999999", "#D55E00", "#E69F00"
LIMIT = "limit (bare products)"
Rows = list[dict[str, str]]
_ON_WHITE = {"facecolor": "white", "alpha": 0.8, "pad": 0.5, "linewidth": 0}
# bars may fill any corner of an axis, so its legend stands above it
_ABOVE = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3, "fontsize": 8}


def draw(csv_file: Path) -> list[Path]:
    """Writes the pictures of one results file beside it; returns their paths."""
    with csv_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    painter = PAINTERS.get(csv_file.stem)
    if painter is None:
        raise ValueError(f"{csv_file.name} is none of {', '.join(f'{k}.csv' for k in PAINTERS)}.")
    return painter(rows, csv_file.parent) if rows else []


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return path


def _where(row: dict[str, str]) -> str:
    commit = f", commit {row['commit']}" if row["commit"] else ""
    return f"{row['cpu']}, torch {row['torch']}, {row['date']}{commit}"


def _colour(name: str) -> str:
    return OURS if name.startswith("prefkern") else PEER


def _linear_logps(rows: Rows, folder: Path) -> list[Path]:
    cases: dict[str, Rows] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    pictures = [_case(name, found, folder) for name, found in cases.items()]
    return [*pictures, _overview(cases, folder)]


def _case(name: str, rows: Rows, folder: Path) -> Path:
    """Time and memory of every variant of one case."""
    limit = next((r for r in rows if r["variant"] == LIMIT and r["status"] == "ok"), None)
    variants = [r for r in rows if r["variant"] != LIMIT]
    variants.sort(key=lambda r: float(r["wall_s"] or "inf"))
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(variants)), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(variants))
    longest = max((float(r["wall_q3_s"]) for r in variants if r["wall_q3_s"]), default=1.0)
    for y, row in zip(places, variants, strict=True):
        if row["status"] != "ok":
            reason = row["reason"] if len(row["reason"]) < 60 else row["reason"][:57] + "..."
            time_axis.text(0.01 * longest, y, f"{row['status']}: {reason}", va="center", fontsize=8)
            continue
        wall = float(row["wall_s"])
        low, high = wall - float(row["wall_q1_s"]), float(row["wall_q3_s"]) - wall
        time_axis.barh(y, wall, color=_colour(row["variant"]))
        time_axis.errorbar(wall, y, xerr=[[max(low, 0)], [max(high, 0)]], color="black", lw=1)
        label = f"  {wall:.3g} s, {float(row['ratio']):.2f}x"
        time_axis.text(wall + max(high, 0), y, label, va="center", fontsize=8, bbox=_ON_WHITE)
        _memory_bar(memory_axis, y, row)
    if limit:
        wall = float(limit["wall_s"])
        time_axis.axvline(
            wall, color=LIMIT_COLOUR, ls="--", lw=1.2, label=f"bare products {wall:.3g} s"
        )
        time_axis.legend(**_ABOVE)
    time_axis.set_yticks(places, [r["variant"] for r in variants], fontsize=9)
    time_axis.set_ylim(len(variants) - 0.5, -0.5)
    time_axis.set_xlim(0, 1.35 * longest)
    time_axis.set_xlabel("seconds per step: median, quartiles, ratio to the bare products")
    memory_axis.set_xlabel("peak MiB above the inputs")
    memory_axis.margins(x=0.2)
    if memory_axis.patches:
        memory_axis.legend(**_ABOVE)
    first = rows[0]
    figure.suptitle(
        f"{name}: {first['step']} step, {first['dtype']}, {first['threads']} thread(s), "
        f"{first['head']} head, N={first['N']} ({first['scored']} scored), D={first['D']}, "
        f"V={first['V']}\n{_where(first)}",
        fontsize=9,
    )
    return _save(figure, folder / f"linear_logps_{name}.png")


def _memory_bar(axis, y: int, row: dict[str, str]) -> None:
    if not row["peak_mib"]:
        return
    gradients, peak = float(row["gradients_mib"]), float(row["peak_mib"])
    # a peak below the gradients is one page-counting error, drawn as what was measured
    shared = min(gradients, peak)
    new = not axis.patches
    axis.barh(y, shared, color=SECOND, label="gradients" if new else None)
    axis.barh(
        y, peak - shared, left=shared, color="#56B4E9", label="everything else" if new else None
    )
    axis.text(peak, y, f"  {peak:.0f}", va="center", fontsize=8)


def _overview(cases: dict[str, Rows], folder: Path) -> Path:
    """Ratio to the bare products over all cases; one dot a variant.

    With one thread it is the ratio of CPU times, which other processes hardly move.
    """
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(cases)), layout="constrained")
    axis = figure.subplots()
    for y, rows in enumerate(cases.values()):
        for row in rows:
            if row["variant"] == LIMIT or row["status"] != "ok":
                continue
            ours = row["variant"] == "prefkern cpu"
            if row["variant"].startswith("prefkern") and not ours:
                continue
            ratio = float(row["ratio_cpu" if row["threads"] == "1" else "ratio"])
            axis.plot(
                ratio, y, "D" if ours else "o", color=_colour(row["variant"]),
                ms=8 if ours else 5, alpha=1.0 if ours else 0.7, zorder=3 if ours else 2,
            )  # fmt: skip
    axis.axvline(1.0, color=LIMIT_COLOUR, ls="--", lw=1.2)
    axis.set_xscale("log")
    ticks = [1, 1.5, 2, 3, 5, 10, 20]
    axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(cases)), list(cases), fontsize=9)
    axis.set_ylim(len(cases) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(
        "step over its bare products (t1: CPU time, t2: wall); blue: prefkern cpu, grey: others"
    )
    first = next(iter(cases.values()))[0]
    figure.suptitle(_where(first), fontsize=9)
    return _save(figure, folder / "linear_logps_overview.png")


def _parts(rows: Rows, folder: Path) -> list[Path]:
    """Share of products, epilogue and rest, one bar a dtype."""
    shares = [r for r in rows if r["part"] == "shares"]
    if not shares:
        return []
    colours = {"products": OURS, "epilogue": SECOND, "rest": PEER}
    kinds = list(dict.fromkeys(r["dtype"] for r in shares))
    figure = Figure(figsize=(9, 1.4 + 0.6 * len(kinds)), layout="constrained")
    axis = figure.subplots()
    for y, kind in enumerate(kinds):
        left = 0.0
        for row in (r for r in shares if r["dtype"] == kind):
            value = max(float(row["value"]), 0.0)  # a rest within its noise may come out below 0
            label = row["what"] if y == 0 else None
            axis.barh(y, value, left=left, color=colours[row["what"]], label=label)
            if value > 3:
                axis.text(
                    left + value / 2, y, f"{value:.0f} %", ha="center", va="center", fontsize=9
                )
            left += value
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_xlabel("share of a DPO step, one thread, percent")
    axis.legend(**_ABOVE)
    figure.suptitle(_where(shares[0]), fontsize=9)
    return [_save(figure, folder / "parts.png")]


def _objective(rows: Rows, folder: Path) -> list[Path]:
    """Microseconds of every loss at every number of sequences."""
    sizes = list(dict.fromkeys(r["S"] for r in rows))
    names = sorted({r["loss"] for r in rows})
    figure = Figure(figsize=(8, 1.5 + 0.2 * len(names)), layout="constrained")
    axis = figure.subplots()
    for colour, n in zip((OURS, SECOND, PEER), sizes, strict=False):
        found = {r["loss"]: float(r["us_median"]) for r in rows if r["S"] == n}
        axis.plot(
            [found[k] for k in names], range(len(names)), "o", ms=4, color=colour, label=f"S={n}"
        )
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xscale("log")
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(alpha=0.3)
    axis.set_xlabel("microseconds, loss and backward from its sequence sums, one thread")
    axis.legend(fontsize=8)
    figure.suptitle(_where(rows[0]), fontsize=9)
    return [_save(figure, folder / "objective.png")]


def _host_overhead(rows: Rows, folder: Path) -> list[Path]:
    rows = sorted(rows, key=lambda r: r["what"].removeprefix("torch_"))
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(rows):
        median = float(row["us_median"])
        axis.barh(y, median, color=PEER if row["what"].startswith("torch_") else OURS)
        times = f", {float(row['times_torch']):.1f}x torch" if row["times_torch"] else ""
        axis.text(median, y, f"  {median:.0f} us{times}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [r["what"] for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlabel("microseconds per call of 16 tokens (median): Python, dispatch, autograd")
    figure.suptitle(_where(rows[0]), fontsize=9)
    return [_save(figure, folder / "host_overhead.png")]


PAINTERS: dict[str, Callable[[Rows, Path], list[Path]]] = {
    "linear_logps": _linear_logps,
    "parts": _parts,
    "objective": _objective,
    "host_overhead": _host_overhead,
}

if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for picture in draw(Path(argument)):
            print(f"wrote {picture}")
