"""The picture of README's first screen: time and memory of one step beside the peers.

`python -m benchmarks.plot benchmarks/results/linear_logps.csv` draws it with the others. Both axes
begin at 0 and are linear, every variant that was measured right is there, and what is missing is
said.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .results import LIMIT

CASE = "dpo-fp32-t1"
NAME = "front.png"
OURS, OTHER, LINE = "#0072B2", "#B0B0B0", "#D55E00"
# Ours of that name are variations of the default or for comparison; the benchmark page has them.
LEFT_OUT = ("prefkern eager", "prefkern cpu, metrics", "prefkern cpu, tail 2^-8")
WORDS = {
    "prefkern cpu": "prefkern",
    "prefkern cpu, budget 0": "prefkern, memory_budget=0",
    "eager log_softmax": "full logits, log_softmax",
    "eager cross_entropy": "full logits, cross_entropy",
    "torch.compile": "full logits, torch.compile",
    "torch linear_cross_entropy": "torch linear_cross_entropy",
    "CCE torch_compile": "Cut Cross-Entropy (torch_compile)",
    "Liger DPO compiled": "Liger DPO, compiled",
}


def front(rows: list[dict[str, str]], folder: Path) -> Path | None:
    """Draws the case; None where the file has no row of it with a memory figure."""
    case = [r for r in rows if r["case"] == CASE and r["status"] == "ok"]
    limit = next((r for r in case if r["variant"] == LIMIT), None)
    shown = [r for r in case if r["variant"] != LIMIT and r["variant"] not in LEFT_OUT]
    if limit is None or not any(r["peak_mib"] for r in shown):
        return None
    shown.sort(key=lambda r: float(r["cpu_s"]))
    figure = Figure(figsize=(9.6, 0.9 + 0.32 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2, sharey=True)
    for y, row in enumerate(shown):
        colour = OURS if row["variant"].startswith("prefkern") else OTHER
        seconds, peak = float(row["cpu_s"]), row["peak_mib"]
        time.barh(y, seconds, color=colour, height=0.72)
        time.text(seconds, y, f" {seconds:.2f}", va="center", fontsize=8)
        if peak:
            memory.barh(y, float(peak), color=colour, height=0.72)
        words = f" {float(peak):.0f}" if peak else " not measured"
        memory.text(float(peak or 0), y, words, va="center", fontsize=8)
    bare = float(limit["cpu_s"])
    time.plot([bare, bare], [-0.55, len(shown) - 0.4], color=LINE, lw=1.2, ls="--", zorder=3)
    label = f"bare matrix products {bare:.2f}"
    time.text(bare, -0.8, label, color=LINE, fontsize=8, ha="center")
    names = [WORDS.get(r["variant"], r["variant"]) for r in shown]
    time.set_yticks(range(len(shown)), names, fontsize=9)
    for tick, row in zip(time.get_yticklabels(), shown, strict=True):
        if row["variant"].startswith("prefkern"):
            tick.set_fontweight("bold")
    time.set_ylim(len(shown) - 0.4, -1.1)
    for axes, title in ((time, "seconds of CPU per step"), (memory, "peak MiB above the inputs")):
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.13 * axes.get_xlim()[1])
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    first = shown[0]
    what = (
        f"One DPO step (reference and policy forward, backward), {first['scored']} tokens, "
        f"D = {first['D']}, V = {first['V']}, {first['dtype']}, {first['threads']} thread"
    )
    commits = ", ".join(dict.fromkeys(r["commit"] for r in case))
    place = f"{first['cpu']}, torch {first['torch']}, commit {commits}, {first['date']}"
    figure.suptitle(f"{what}\n{place}", fontsize=8, color="0.35")
    path = folder / NAME
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
