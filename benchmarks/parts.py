"""Where prefkern's time goes on a CPU: products, epilogue, the rest.

The cpu backend folds each tile of logits while its product is still in cache, so no profiler sees
the two apart. Two measurements that do:

epilogue  the fold and the gradient alone, on one tile that stays in the L2 cache, one thread
shares    a DPO step at several hidden sizes D: products grow with D, everything else does not, so
          the line through the times splits them; of the constant part, the epilogue is what its
          own rate says, the rest is packing, memory traffic and Python
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from . import inside
from .cases import BASE, Case, make_inputs
from .peers import VARIANTS
from .results import Row, Table
from .timing import Cpu

TILE = (64, 2048)  # rows, columns: 512 KiB of fp32 logits, half of a 1 MiB L2 cache
EPILOGUES = ("forward", "forward with entropy", "backward", "backward with entropy")
HIDDEN_SIZES = (256, 512, 1024)
COLUMNS = ("part", "what", "dtype", "value", "unit", "note")


def run(out: Path, size: str, rounds: int, say: Callable[[str], None] = print) -> Path:
    """Writes `out`/parts.csv: the two measurements, or the reason why they are not there."""
    try:
        rows = epilogue(size)
        rates = {row["what"]: row["value"] for row in rows}
        for dtype in ("float32", "bfloat16"):
            rows += shares(dtype, size, rounds, rates)
    except ImportError as missing:
        rows = [{"part": "epilogue", "note": str(missing)}]
    table = Table(out / "parts.csv", COLUMNS)
    table.add(rows)
    for r in rows:
        say("  ".join(f"{r[c]:.3f}" if c == "value" else str(r[c]) for c in COLUMNS if c in r))
    return table.path


def epilogue(size: str) -> list[Row]:
    """Nanoseconds per logit of the fold and of the gradient.

    Raises:
        ImportError: the native library is not there.
    """
    repeats = {"full": 2000, "quick": 200, "tiny": 2}[size]
    times, isa = inside.cpu_epilogue(*TILE, repeats)
    note = f"tile {TILE[0]} x {TILE[1]} fp32, {repeats} times, {isa}"
    return [
        _row("epilogue", what, "float32", ns, "ns/logit", note)
        for what, ns in zip(EPILOGUES, times, strict=True)
    ]


def shares(dtype: str, size: str, rounds: int, rates: dict[str, float]) -> list[Row]:
    """Share of products, epilogue and the rest in a DPO step, one thread."""
    torch.set_num_threads(1)
    base = Case("shares", "dpo", BASE).resized(size).shape
    steps = {}
    for d in HIDDEN_SIZES:
        case = Case("shares", "dpo", base._replace(D=d), dtype=dtype)
        inputs = make_inputs(case)
        steps[d] = (VARIANTS["prefkern cpu"].build(case, inputs), inputs)
    times: dict[int, list[float]] = {d: [] for d in steps}
    for i in range(rounds + 1):
        for d, (step, inputs) in steps.items():
            inputs.clear()
            gc.collect()
            wall = Cpu().seconds(lambda step=step, inputs=inputs: step(inputs)[0].backward())
            if i > 0:  # the first round allocates and packs for the first time
                times[d].append(wall)
    medians = {d: statistics.median(t) for d, t in times.items()}
    constant = statistics.linear_regression(list(medians), list(medians.values())).intercept
    total = medians[512]
    logits = base.N * base.V
    # two forward folds (reference, policy) and one gradient
    fold = 1e-9 * logits * (2 * rates["forward"] + rates["backward"])
    sizes = ", ".join(f"D={d}: {t:.3f} s" for d, t in medians.items())
    note = f"of {total:.3f} s; {sizes}"
    parts = {"products": total - constant, "epilogue": fold, "rest": constant - fold}
    return [
        _row("shares", what, dtype, 100 * seconds / total, "%", f"{seconds:.3f} s {note}")
        for what, seconds in parts.items()
    ]


def _row(*cells: object) -> Row:
    return dict(zip(COLUMNS, cells, strict=True))
