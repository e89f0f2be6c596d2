"""Pictures of the CSV files: `python -m benchmarks.plot results/linear_logps.csv ...`.

No measuring here. Figures are drawn by Agg without pyplot, so no display is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .front import front
from .results import LIMIT, read
from .tail import tail

OURS, OTHER, LIMIT_COLOUR, SECOND, SKY = "#0072B2", "#999999", "#D55E00", "#E69F00", "#56B4E9"
# beginning of a variant's name -> colour; the legend of the overview
FAMILIES = {
    "prefkern": OURS, "Liger": "#009E73", "TRL": "#CC79A7", "CCE": SECOND, "quack": "#F0E442",
    "torch linear_cross_entropy": "black", "": OTHER,
}  # fmt: skip
OURS_BY_DEFAULT = ("prefkern cpu", "prefkern triton", "prefkern cuda", "TRL + prefkern")
Rows = list[dict[str, str]]
# bars may fill any corner of an axis, so its legend stands above it
_ABOVE = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "fontsize": 8}


def draw(csv_file: Path) -> list[Path]:
    """Writes the pictures of one results file beside it; returns their paths."""
    if csv_file.stem not in PAINTERS:
        raise ValueError(f"{csv_file.name} is none of {', '.join(f'{k}.csv' for k in PAINTERS)}.")
    rows = read(csv_file)
    return PAINTERS[csv_file.stem](rows, csv_file.parent) if rows else []


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return path


def _rows_of(count: int, width: float, height: float, columns: int = 1, **more):
    """(figure, axes) of horizontal bars: `count` places, the first on top."""
    figure = Figure(figsize=(width, 1.5 + height * count), layout="constrained")
    axes = figure.subplots(1, columns, sharey=True, squeeze=False, **more)[0]
    axes[0].set_ylim(count - 0.5, -0.5)
    return figure, axes


def _where(rows: Rows) -> str:
    """Place, dates and commits of all rows: parts of a file may be measured apart."""

    def all_of(column: str, most: int = 8) -> str:
        values = [v for v in dict.fromkeys(r.get(column, "") for r in rows) if v]
        return ", ".join(values if len(values) <= most else [*values[:most], "..."])

    commits = all_of("commit")
    return f"{all_of('gpu') or all_of('cpu')}, torch {all_of('torch')}, {all_of('date')}" + (
        f"\ncommit {commits}" if commits else ""
    )


def colour_of(name: str) -> str:
    """Of the last family that is named: in a trainer's step, of what the trainer was given."""
    own = name.removeprefix("TRL + ").removeprefix("TRL, full")
    return next(colour for start, colour in FAMILIES.items() if own.startswith(start))


def _measure(row: dict[str, str]) -> tuple[str, str, str]:
    """(column of the seconds, of their ratio, what they are). One thread: CPU time, which other
    processes hardly move."""
    if row["threads"] == "1" and not row.get("gpu"):
        return "cpu_s", "ratio_cpu", "CPU time"
    return "wall_s", "ratio", "time"


def _linear_logps(rows: Rows, folder: Path) -> list[Path]:
    cases: dict[str, Rows] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    plain = {name: found for name, found in cases.items() if not name.startswith("tail-")}
    pictures = [_case(name, found, folder) for name, found in plain.items()]
    compared = {name: found for name, found in plain.items() if any(r["ratio"] for r in found)}
    pictures += [picture for paint in (front, tail) if (picture := paint(rows, folder))]
    return [*pictures, *([_overview(compared, folder)] if compared else [])]


def _case(name: str, rows: Rows, folder: Path) -> Path:
    """Time of every variant over the bare products (or seconds), and memory where measured."""
    limit = next((r for r in rows if r["variant"] == LIMIT and r["status"] == "ok"), None)
    seconds, ratio, what = _measure(rows[0])
    shown = ratio if limit else seconds
    bare = "bare products and layers" if rows[0]["step"] == "trl" else "bare products"
    variants = [r for r in rows if r["variant"] != LIMIT]
    variants.sort(key=lambda r: float(r[shown] or "inf"))
    memory = any(r["peak_mib"] for r in variants)
    more = {"width_ratios": (3, 2)} if memory else {}
    figure, axes = _rows_of(len(variants), 11 if memory else 8, 0.36, 2 if memory else 1, **more)
    time = axes[0]
    ends = [float(r["ratio_q3"] if shown == "ratio" else r[shown]) for r in variants if r[shown]]
    longest = max(ends, default=1.0)
    for y, row in enumerate(variants):
        if row["status"] != "ok":
            reason = row["reason"] if len(row["reason"]) < 60 else row["reason"][:57] + "..."
            time.text(0.01 * longest, y, f"{row['status']}: {reason}", va="center", fontsize=8)
            continue
        value, end = float(row[shown]), float(row[shown])
        time.barh(y, value, color=OURS if "prefkern" in row["variant"] else OTHER)
        if shown == "ratio":
            low, end = (float(row[f"ratio_{q}"]) for q in ("q1", "q3"))
            errors = [[max(value - low, 0)], [max(end - value, 0)]]
            time.errorbar(value, y, xerr=errors, color="black", lw=1)
        label = f"  {value:.2f}x, {float(row[seconds]):.3g} s" if limit else f"  {value:.3g} s"
        # behind the bar, its quartile and the dashed line, which would cross the words
        line = 1.0 if limit and end > 0.7 else 0.0
        time.text(max(value, end, line), y, label, va="center", fontsize=8)
        if row["peak_mib"]:
            _memory_bar(axes[1], y, row)
    if limit:
        label = f"{bare}, {float(limit[seconds]):.3g} s"
        time.axvline(1.0, color=LIMIT_COLOUR, ls="--", lw=1.2, label=label)
        time.legend(**_ABOVE)
    time.set_yticks(range(len(variants)), [r["variant"] for r in variants], fontsize=9)
    time.set_xlim(0, 1.4 * longest)
    spread = ", quartiles" if shown == "ratio" else ""
    over = f"{what} of a step over its {bare}" if limit else f"seconds of a step ({what})"
    time.set_xlabel(f"{over}: median{spread}")
    if memory:
        axes[1].set_xlabel("peak MiB above the inputs")
        axes[1].margins(x=0.2)
        axes[1].legend(ncols=3, **_ABOVE)
    first = rows[0]
    place = "" if first.get("gpu") else f"{first['threads']} thread(s), "
    figure.suptitle(
        f"{name}: {first['step']} step, {first['dtype']}, {place}{first['head']} head, "
        f"N={first['N']} ({first['scored']} scored), D={first['D']}, V={first['V']}\n"
        + _where(rows),
        fontsize=9,
    )
    return _save(figure, folder / f"linear_logps_{name}.png")


def _memory_bar(axis, y: int, row: dict[str, str]) -> None:
    peak = float(row["peak_mib"])
    # a peak below the gradients is one page-counting error, drawn as what was measured
    left, first = 0.0, not axis.patches
    parts = {"gradients": ("gradients_mib", SECOND), "kept logits": ("kept_mib", SKY)}
    for name, (column, colour) in parts.items():
        size = min(float(row[column] or 0.0), peak - left)
        axis.barh(y, size, left=left, color=colour, label=name if first else None)
        left += size
    axis.barh(y, peak - left, left=left, color=OTHER, label="the rest" if first else None)
    axis.text(peak, y, f"  {peak:.0f}", va="center", fontsize=8)


def _overview(cases: dict[str, Rows], folder: Path) -> Path:
    """Ratio to the bare products over all cases; one dot a variant, of ours the default alone."""
    figure, (axis,) = _rows_of(len(cases), 9, 0.42)
    values, labels = [], []
    for y, (name, rows) in enumerate(cases.items()):
        _, ratio, what = _measure(rows[0])
        labels.append(f"{name} ({what})")
        for row in rows:
            ours = colour_of(row["variant"]) == OURS
            default = row["variant"] in OURS_BY_DEFAULT
            if row["variant"] == LIMIT or not row[ratio] or (ours and not default):
                continue
            values.append(float(row[ratio]))
            axis.plot(
                values[-1], y, "D" if ours else "o", color=colour_of(row["variant"]),
                ms=8 if ours else 6, alpha=1.0 if ours else 0.8, zorder=3 if ours else 2,
            )  # fmt: skip
    drawn = {colour_of(r["variant"]) for rows in cases.values() for r in rows}
    for start, colour in FAMILIES.items():
        if colour in drawn:
            marker = "D" if colour == OURS else "o"
            axis.plot([], [], marker, color=colour, label=start or "full logits")
    axis.axvline(1.0, color=LIMIT_COLOUR, ls="--", lw=1.2)
    axis.set_xscale("log")
    axis.set_xlim(0.9 * min([1.0, *values]), 1.1 * max([1.5, *values]))
    low, high = axis.get_xlim()
    ticks = [t for t in (0.2, 0.3, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 10, 20) if low < t < high]
    axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(cases)), labels, fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(
        "a step over its bare products, in trl-* its layers too (dashed line), logarithmic"
    )
    axis.legend(ncols=len(FAMILIES), **_ABOVE)
    figure.suptitle(_where([rows[0] for rows in cases.values()]), fontsize=9)
    return _save(figure, folder / "linear_logps_overview.png")


def _parts(rows: Rows, folder: Path) -> list[Path]:
    """Share of products, epilogue and rest, one bar a dtype."""
    shares = [r for r in rows if r["part"] == "shares"]
    if not shares:
        return []
    colours = {"products": OURS, "epilogue": SECOND, "rest": OTHER}
    kinds = list(dict.fromkeys(r["dtype"] for r in shares))
    figure, (axis,) = _rows_of(len(kinds), 9, 0.6)
    for y, kind in enumerate(kinds):
        left, words = 0.0, []
        for row in (r for r in shares if r["dtype"] == kind):
            # a rest within its noise may come out below 0: the number says so, the bar cannot
            value = max(float(row["value"]), 0.0)
            label = row["what"] if y == 0 else None
            axis.barh(y, value, left=left, color=colours[row["what"]], label=label)
            words.append(f"{float(row['value']):.1f}")
            left += value
        text = " + ".join(words).replace("+ -", "- ")
        axis.text(left, y, f"  {text} %", va="center", fontsize=9)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_xlim(0, 125)
    axis.set_xlabel("share of a DPO step, one thread, percent")
    axis.legend(ncols=3, **_ABOVE)
    figure.suptitle(_where(shares), fontsize=9)
    return [_save(figure, folder / "parts.png")]


def _objective(rows: Rows, folder: Path) -> list[Path]:
    """Microseconds of every loss at every number of sequences, slowest on top."""
    sizes = list(dict.fromkeys(r["S"] for r in rows))
    times = {(r["loss"], r["S"]): float(r["us_median"]) for r in rows}
    names = sorted({r["loss"] for r in rows}, key=lambda k: -times[k, sizes[-1]])
    figure, (axis,) = _rows_of(len(names), 8, 0.17)
    for colour, n in zip((OURS, SECOND, LIMIT_COLOUR), sizes, strict=False):
        axis.plot(
            [times[k, n] for k in names], range(len(names)), "o", ms=4, color=colour, label=f"S={n}"
        )
    axis.set_yticks(range(len(names)), names, fontsize=7)
    _plain_log_ticks(axis, times.values())
    axis.grid(alpha=0.3)
    axis.set_xlabel("microseconds, loss and backward from its sequence sums, one thread")
    axis.legend(ncols=3, **_ABOVE)
    figure.suptitle(_where(rows), fontsize=9)
    return [_save(figure, folder / "objective.png")]


def _plain_log_ticks(axis, values: Iterable[float]) -> None:
    """A logarithmic axis that fits the values, with numbers a reader can name."""
    low, high = min(values), max(values)
    axis.set_xscale("log")
    axis.set_xlim(0.8 * low, 1.25 * high)
    ticks = [k * 10**e for e in range(7) for k in (1, 2, 5) if low <= k * 10**e <= 1.25 * high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()


def _host_overhead(rows: Rows, folder: Path) -> list[Path]:
    figure, (axis,) = _rows_of(len(rows), 9, 0.3)
    for y, row in enumerate(rows):
        median = float(row["us_median"])
        axis.barh(y, median, color=OTHER if "torch" in row["what"] else OURS)
        times = f", {float(row['times_torch']):.1f}x torch" if row["times_torch"] else ""
        axis.text(median, y, f"  {median:.0f} us{times}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [r["what"] for r in rows], fontsize=8)
    axis.margins(x=0.25)
    axis.set_xlabel("microseconds per call of 16 tokens (median): Python, dispatch, autograd")
    figure.suptitle(_where(rows), fontsize=9)
    return [_save(figure, folder / "host_overhead.png")]


PAINTERS: dict[str, Callable[[Rows, Path], list[Path]]] = {
    "linear_logps": _linear_logps,
    "parts": _parts,
    "objective": _objective,
    "host_overhead": _host_overhead,
    **dict.fromkeys(("predicted", "cluster", "ranks"), lambda rows, folder: []),
}

if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for picture in draw(Path(argument)):
            print(f"wrote {picture}")
