"""Where prefkern's time goes on a CPU: products, epilogue, the rest.

The cpu backend folds each tile of logits while its product is still in cache, so no profiler sees
the two apart. Two measurements that do:

epilogue  the fold and the gradient alone, on one tile that stays in the L2 cache, one thread
shares    a DPO step at several hidden sizes D: products grow with D, everything else does not, so
          the line through the times splits them; of the constant part, the epilogue is what its
          own rate says, the rest is packing, memory traffic and Python
"""

from __future__ import annotations

import csv
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import machine, peaks
from .cases import Case, make_inputs
from .peers import VARIANTS
from .shapes import BASE, Shape, reduced

TILE = (64, 2048)  # rows, columns: 512 KiB of fp32 logits, half of a 1 MiB L2 cache
EPILOGUES = ("forward", "forward with entropy", "backward", "backward with entropy")
HIDDEN_SIZES = (256, 512, 1024)
COLUMNS = ("part", "what", "dtype", "value", "unit", "note")


class Part(NamedTuple):
    part: str  # "epilogue" or "shares"
    what: str
    dtype: str
    value: float
    unit: str
    note: str = ""


def run(out: Path, size: str, rounds: int, say: Callable[[str], None] = print) -> Path:
    """Writes `out`/parts.csv: the two measurements, or the reason why they are not there."""
    try:
        rows = epilogue(size)
        rates = {row.what: row.value for row in rows}
        for dtype in ("float32", "bfloat16"):
            rows += shares(dtype, size, rounds, rates)
    except ImportError as missing:
        rows = [Part("epilogue", "", "", float("nan"), "", str(missing))]
    path = out / "parts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *machine.describe()])
        for row in rows:
            writer.writerow([*row[:3], f"{row.value:.4g}", *row[4:], *machine.describe().values()])
    for r in rows:
        say(f"{r.part:<10}{r.dtype:<10}{r.what:<28}{r.value:>9.3f} {r.unit}  {r.note}")
    return path


def epilogue(size: str) -> list[Part]:
    """Nanoseconds per logit of the fold and of the gradient.

    Raises:
        ImportError: the native library is not there.
    """
    from prefkern.backends import cpu

    if reason := cpu.load_error():
        raise ImportError(f"backend 'cpu' is off: {reason}")
    rows, columns = TILE
    repeats = {"full": 2000, "quick": 200, "tiny": 2}[size]
    times = torch.ops.prefkern_native.bench_epilogue(torch.empty(0), rows, columns, repeats)
    note = f"tile {rows} x {columns} fp32, {repeats} times, {cpu.isa()}"
    return [
        Part("epilogue", what, "float32", ns, "ns/logit", note)
        for what, ns in zip(EPILOGUES, times.tolist(), strict=True)
    ]


def shares(dtype: str, size: str, rounds: int, rates: dict[str, float]) -> list[Part]:
    """Share of products, epilogue and the rest in a DPO step, one thread."""
    torch.set_num_threads(1)
    base = reduced(BASE, size)
    steps = {}
    for d in HIDDEN_SIZES:
        case = Case("shares", "dpo", Shape(base.pairs, base.tokens, d, base.V), dtype=dtype)
        steps[d] = (VARIANTS["prefkern cpu"].build(case), make_inputs(case))
    times: dict[int, list[float]] = {d: [] for d in steps}
    for i in range(rounds + 1):
        for d, (step, inputs) in steps.items():
            inputs.clear()
            gc.collect()
            wall = peaks.stopwatch(lambda step=step, inputs=inputs: step(inputs).backward()).wall
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
        Part("shares", what, dtype, 100 * seconds / total, "%", f"{seconds:.3f} s {note}")
        for what, seconds in parts.items()
    ]
