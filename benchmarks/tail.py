"""The picture of the cases `tail-*`: time over the bare products against the share of units needed.

Each panel is a dtype, each line a kind of step with tail_mass = 2^-8; its open marker at the right
edge is the same step without, rows mixed alike.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NAME = "linear_logps_tail.png"
TAIL, EXACT = "prefkern cpu, tail 2^-8", "prefkern cpu"
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")
KINDS = {"tdpo": "TDPO", "frozen": "DPO, frozen head", "alone": "policy alone"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def kind(row: dict[str, str]) -> str:
    """What a line stands for: the step, or the vocabulary of a DPO step."""
    words = (KINDS[part] for part in row["case"].split("-") if part in KINDS)
    return f"{next(words, 'DPO')}, V = {int(row['V']):,}"


def tail(rows: list[dict[str, str]], folder: Path) -> Path | None:
    """Draws the cases; None where the file has none of them."""
    rows = [r for r in rows if r["case"].startswith("tail-") and r["status"] == "ok"]
    kinds = list(dict.fromkeys(kind(r) for r in rows if r["variant"] == TAIL))
    if not kinds:
        return None
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (dtype, name) in zip(figure.subplots(1, 2, sharey=True), DTYPES.items(), strict=True):
        here = [r for r in rows if r["dtype"] == dtype]
        for label, colour in zip(kinds, COLOURS, strict=False):
            points = sorted(
                (float(r["share"]), float(r["ratio_cpu"]))
                for r in here
                if kind(r) == label and r["variant"] == TAIL
            )
            exact = [r for r in here if kind(r) == label and r["variant"] == EXACT]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label, ms=5)
            if exact:
                last = max(exact, key=lambda r: float(r["share"]))
                axis.plot(1.04, float(last["ratio_cpu"]), "o", color=colour, mfc="white", ms=6)
        axis.axhline(1.0, color="0.4", ls="--", lw=1.2)
        axis.text(0.0, 1.01, "bare products", color="0.4", fontsize=8)
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("share of units needed")
        axis.grid(True, color="0.92")
        axis.set_axisbelow(True)
    first = figure.axes[0]
    first.set_ylim(bottom=0)
    first.set_ylabel("CPU time over the bare products")
    first.plot([], [], "o", color="0.4", mfc="white", label="tail_mass=0")
    first.legend(fontsize=8, loc="lower right")
    place = rows[0]
    figure.suptitle(
        f"A step with tail_mass = 2^-8, D = {place['D']}, {place['threads']} thread: "
        f"{place['cpu']}, torch {place['torch']}, {place['date']}",
        fontsize=9,
    )
    figure.savefig(folder / NAME, dpi=110)
    return folder / NAME
