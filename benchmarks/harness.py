"""Measuring: interleaved rounds, errors against float64, peak memory, rows of the CSV.

Every case runs in a process of its own with its own thread count (compiled code and OpenMP fix the
count at first use); every memory figure in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import oracle, peaks
from .cases import MIB, Case, Inputs, make_inputs
from .variants import Step, Variant

# Largest relative error (loss, gradients) with which a variant is timed. fp32: 500 times the worst
# correct peer (Inductor's exp); bf16: five times what rounded logits cost. Above is a wrong result.
ERROR_BOUND = {"float32": (1e-3, 5e-3), "bfloat16": (3e-2, 5e-2)}
LIMIT = "limit (bare products)"
COLUMNS = (
    "case", "step", "variant", "status", "reason", "threads", "dtype", "head", "N", "scored", "D",
    "V", "pairs", "rounds", "wall_s", "wall_min_s", "wall_q1_s", "wall_q3_s", "cpu_s", "forward_s",
    "ratio", "ratio_q1", "ratio_q3", "ratio_cpu", "products", "ratio_own", "ratio_own_cpu",
    "gflops", "err_loss", "err_d_hidden", "err_d_weight", "peak_mib", "gradients_mib", "kept_mib",
    "beyond_mib", "products_used", "package", "version", "torch", "python", "cpu", "isa", "commit",
    "date",
)  # fmt: skip
Row = dict[str, object]


@dataclass
class Samples:
    """Seconds of one variant, one entry a round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)


class OutOfBounds(Exception):
    """A variant's error is too large to call its time a time of this computation."""


def blank_row(case: Case, variant: str, status: str, reason: str = "") -> Row:
    return {
        "case": case.name, "step": case.step, "variant": variant, "status": status,
        "reason": " ".join(reason.split())[:300], "threads": case.threads, "dtype": case.dtype,
        "head": "frozen" if case.frozen else "trainable", "N": case.shape.N, "scored": case.scored,
        "D": case.shape.D, "V": case.shape.V, "pairs": case.shape.pairs,
    }  # fmt: skip


def errors(
    case: Case, step: Step, inputs: Inputs, truth: oracle.Truth
) -> tuple[float, float, float | None]:
    """Relative errors of (loss, dH, dW) after one step; dW is None with a frozen head.

    Raises:
        OutOfBounds: an error above ERROR_BOUND, or not a number.
    """
    inputs.clear()
    loss = step(inputs)
    loss.backward()
    found = (
        oracle.relative_error(loss.detach(), truth.loss),
        oracle.relative_error(inputs.hidden.grad, truth.d_hidden),
        None if case.frozen else oracle.relative_error(inputs.weight.grad, truth.d_weight),
    )
    of_loss, of_gradients = ERROR_BOUND[case.dtype]
    bounds = (of_loss, of_gradients, of_gradients)
    for what, error, bound in zip(("loss", "dH", "dW"), found, bounds, strict=True):
        if error is not None and not error <= bound:
            raise OutOfBounds(f"error of {what} is {error:.2g}, above {bound:g}: not timed")
    return found


def time_case(
    case: Case, variants: Iterable[Variant], truth: oracle.Truth, rounds: int
) -> list[Row]:
    """Rows of the limit and of every variant, timed in the same rounds in shuffled order."""
    torch.set_num_threads(case.threads)
    inputs = make_inputs(case)
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    chosen: dict[str, Variant] = {}
    for variant in variants:
        name = variant.name
        try:
            step = variant.build(case)
            found = errors(case, step, inputs, truth)
        except ImportError as missing:
            rows[name] = blank_row(case, name, "missing", f"{type(missing).__name__}: {missing}")
            continue
        except OutOfBounds as wrong:
            rows[name] = blank_row(case, name, "refused", str(wrong))
            continue
        rows[name] = blank_row(case, name, "ok")
        rows[name] |= dict(zip(("err_loss", "err_d_hidden", "err_d_weight"), found, strict=True))
        steps[name], chosen[name] = step, variant

    winners = peaks.choose(case)
    samples = {name: Samples() for name in steps}
    bare: dict[str, Samples] = {product: Samples() for product in winners}
    order = [*steps, LIMIT]
    dice = random.Random(0)
    gc.collect()
    gc.freeze()  # imported modules need not be walked by every collection below
    for _ in range(rounds):
        dice.shuffle(order)
        for name in order:
            gc.collect()
            if name == LIMIT:
                for product, winner in winners.items():
                    timed = peaks.stopwatch(winner.call)
                    bare[product].wall.append(timed.wall)
                    bare[product].cpu.append(timed.cpu)
            else:
                _time_step(steps[name], inputs, samples[name])

    limit = _limit(case, bare)
    per_product = peaks.flops_per_product(case)
    flops = per_product * sum(case.products.values())
    limit_row = blank_row(case, LIMIT, "ok") | _summary(limit, limit, rounds, flops)
    limit_row["products"] = sum(case.products.values())
    speeds = {p: per_product / 1e9 / statistics.median(bare[p].wall) for p in winners}
    limit_row["products_used"] = "; ".join(
        f"{product}: {w.how} {speeds[product]:.0f} GFLOP/s" for product, w in winners.items()
    )
    for name, variant in chosen.items():
        row = rows[name] | _summary(samples[name], limit, rounds, flops)
        count = variant.products(case)
        if count is not None:
            row["products"] = round(count, 2)
            again = variant.recompute(case)  # extra products of a scheme are forwards again
            for kind, column in (("wall", "ratio_own"), ("cpu", "ratio_own_cpu")):
                rows_of = (getattr(x, kind) for x in (samples[name], limit, bare["forward"]))
                row[column] = statistics.median(
                    t / (base + again * forward) for t, base, forward in zip(*rows_of, strict=True)
                )
        rows[name] = row
    return [limit_row, *rows.values()]


def _time_step(step: Step, inputs: Inputs, samples: Samples) -> None:
    inputs.clear()
    halfway = 0.0

    def run() -> None:
        nonlocal halfway
        loss = step(inputs)
        halfway = time.perf_counter()
        loss.backward()

    start = time.perf_counter()
    timed = peaks.stopwatch(run)
    samples.wall.append(timed.wall)
    samples.cpu.append(timed.cpu)
    samples.forward.append(halfway - start)


def _limit(case: Case, bare: Mapping[str, Samples]) -> Samples:
    """Per round: the sum of the case's products."""
    total = Samples()
    for kind in ("wall", "cpu"):
        columns = [[n * t for t in getattr(bare[p], kind)] for p, n in case.products.items() if n]
        getattr(total, kind).extend(sum(column) for column in zip(*columns, strict=True))
    return total


def _summary(samples: Samples, limit: Samples, rounds: int, flops: float) -> Row:
    """Medians and quartiles; a ratio is formed within each round, then its median taken."""
    ratios = [a / b for a, b in zip(samples.wall, limit.wall, strict=True)]
    wall = statistics.median(samples.wall)
    return {
        "rounds": rounds, "wall_s": wall, "wall_min_s": min(samples.wall),
        "wall_q1_s": _quartile(samples.wall, 1), "wall_q3_s": _quartile(samples.wall, 3),
        "cpu_s": statistics.median(samples.cpu),
        "forward_s": statistics.median(samples.forward) if samples.forward else None,
        "ratio": statistics.median(ratios), "ratio_q1": _quartile(ratios, 1),
        "ratio_q3": _quartile(ratios, 3),
        "ratio_cpu": statistics.median(a / b for a, b in zip(samples.cpu, limit.cpu, strict=True)),
        "gflops": flops / 1e9 / wall,
    }  # fmt: skip


def _quartile(values: list[float], which: int) -> float:
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=4, method="inclusive")[which - 1]


# ---- memory --------------------------------------------------------------------------------------
def memory_row(case: Case, variant: Variant) -> Row:
    """Peak resident memory of one step above the inputs, MiB. Meant for a fresh process.

    The kernel's high-water mark is reset before the step (/proc/self/clear_refs), so nothing is
    sampled. Libraries are loaded by a tiny step first. The level before the first full step counts,
    so that buffers a variant keeps between calls are part of its peak; a compiled variant is
    counted from after its first call, because compiling itself takes hundreds of MiB. Growth of
    file-backed pages (code of libraries) is left out.
    """
    torch.set_num_threads(case.threads)
    inputs = make_inputs(case)
    if not variant.compiled:
        small = case.resized("tiny")
        _run(variant.build(small), make_inputs(small))
    step = variant.build(case)
    before = _level()
    _reset_peak()
    _run(step, inputs)
    if variant.compiled:
        before = _level()
    _reset_peak()
    _run(step, inputs)
    after = _status()
    pages = after["RssFile"] + after["RssShmem"] - before["RssFile"] - before["RssShmem"]
    peak = (after["VmHWM"] - before["VmRSS"] - max(pages, 0)) / MIB
    gradients, kept = case.gradient_bytes / MIB, variant.kept_bytes(case) / MIB
    return {
        "peak_mib": peak, "gradients_mib": gradients, "kept_mib": kept,
        "beyond_mib": peak - gradients - kept,
    }  # fmt: skip


def _run(step: Step, inputs: Inputs) -> None:
    inputs.clear()
    step(inputs).backward()
    inputs.clear()


def _level() -> dict[str, int]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status()


def _status() -> dict[str, int]:
    """Sizes of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# ---- where and when ------------------------------------------------------------------------------
def worker_environment(threads: int, keep_memory: bool = False) -> dict[str, str]:
    """Environment of a measuring process.

    keep_memory: freed memory stays with the process (glibc), as under a caching allocator, for
    every variant alike. Without it each step maps its large buffers anew: 0.1 s for 250 MiB, and
    0.3 to 0.6 s on a virtual machine that hands freed pages back to its host.
    """
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)} if keep_memory else {}
    return {
        **os.environ,
        **keep,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # peers import transformers and datasets; nothing may reach for a network
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
