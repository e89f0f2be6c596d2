"""Measuring a case: errors against float64 first, then interleaved rounds, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import oracle, products, trl_step
from .cases import MIB, Case, Inputs, make_inputs
from .results import LIMIT, Row, blank_row
from .timing import Call, Cpu, Sample, interleaved, quartile
from .variants import Step, Variant

# Largest relative error (loss, gradients and per-token log-probabilities) with which a variant is
# timed. fp32: 500 times the worst correct peer (Inductor's exp); bf16: five times what rounded
# logits cost. Above is a wrong result. A small KL of rounded logits is off by half without being
# wrong; its column says by how much.
ERROR_BOUND = {"float32": (1e-3, 5e-3), "bfloat16": (3e-2, 5e-2)}
KL_BOUND = 0.6
SPARE_BYTES = 8 << 30  # left free on a GPU beside the full logits of a variant


class OutOfBounds(Exception):
    """A variant's error is too large to call its time a time of this computation."""


def inputs_of(case: Case, device: Cpu) -> Any:
    if case.step == "trl":
        return trl_step.make_inputs(case)
    return make_inputs(case, device.tensors)


def truth_of(case: Case, inputs: Any) -> oracle.Truth:
    if case.step == "trl":
        return oracle.Truth(*trl_step.truth(case, inputs))
    return oracle.evaluate(case, inputs)


def errors(case: Case, step: Step, inputs: Inputs, truth: oracle.Truth) -> Row:
    """Columns err_* after one step: relative errors of the loss, the statistics, the gradients.

    Raises:
        OutOfBounds: an error above its bound, or not a number.
    """
    inputs.clear()
    loss, tokens = step(inputs)
    loss.backward()
    of_loss, of_others = ERROR_BOUND[case.dtype]
    pairs = {"loss": (loss.detach(), truth.loss)}
    pairs |= {name: (tokens[name].detach(), truth.tokens[name]) for name in tokens}
    pairs |= {name: (x.grad, truth.gradients[name]) for name, x in inputs.leaves.items()}
    found = {what: oracle.relative_error(*both) for what, both in pairs.items()}
    for what, error in found.items():
        bound = of_loss if what == "loss" else of_others
        if what == "fkl" or (what == "loss" and "fkl" in tokens):
            bound = max(bound, KL_BOUND if case.dtype == "bfloat16" else 0.0)
        if not error <= bound:
            raise OutOfBounds(f"error of {what} is {error:.2g}, above {bound:g}: not timed")
    return {f"err_{what}": error for what, error in found.items()}


def prepare(
    variant: Variant, case: Case, inputs: Any, truth: oracle.Truth, device: Cpu
) -> tuple[Row, Step | None]:
    """One step for the error, on a GPU one for the memory; (row, the step to time, if any).

    Whatever a variant raises is a row: one that does not run here must not end the table.
    """
    need = variant.logits * case.models * case.scored * case.shape.V
    if need and (free := device.free_bytes) is not None and need > free - SPARE_BYTES:
        return blank_row(case, variant.name, "skipped", "its logits do not fit"), None
    try:
        step = variant.build(case, inputs)
        row = blank_row(case, variant.name, "ok") | errors(case, step, inputs, truth)
        inputs.clear()
        if (peak := device.peak_bytes(lambda: step(inputs)[0].backward())) is not None:
            row |= memory_columns(peak, variant, case, inputs)
    except ImportError as missing:
        return blank_row(
            case, variant.name, "missing", f"{type(missing).__name__}: {missing}"
        ), None
    except OutOfBounds as wrong:
        return blank_row(case, variant.name, "refused", str(wrong)), None
    except Exception as error:
        return blank_row(case, variant.name, "failed", f"{type(error).__name__}: {error}"), None
    finally:
        inputs.clear()
    return row, step


def time_case(
    case: Case,
    variants: Iterable[Variant],
    device: Cpu,
    rounds: int,
    trying: Callable[[str], bool] = lambda name: True,
) -> Iterator[Row]:
    """Rows of the limit and of every variant, timed in the same rounds.

    A row without a time is given at once, the others after the rounds. `trying(name)` is told what
    comes next and may refuse it; DeviceLost ends the case where the device is gone.
    """
    if device.kind == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    inputs = inputs_of(case, device)
    truth = truth_of(case, inputs)
    if device.kind == "cpu":
        torch.set_num_threads(case.threads)
    rows: dict[str, tuple[Row, Variant]] = {}
    runs: dict[str, list[Call]] = {}
    for variant in variants:
        if not trying(variant.name):
            continue
        row, step = prepare(variant, case, inputs, truth, device)
        if step is None:
            yield row
            device.check()
            continue
        rows[variant.name], runs[variant.name] = (row, variant), _laps(step, inputs)
    del truth
    winners = _unavoidable(case, inputs, device) if trying(LIMIT) else {}
    bare_runs = {f"bare {product}": [winner.call] for product, winner in winners.items()}
    try:
        samples = interleaved(runs | bare_runs, device, rounds, inputs.clear)
    except Exception as error:
        device.check()
        for row, _ in rows.values():
            yield row | {"status": "failed", "reason": f"while timed: {error}"[:300]}
        return
    bare = {product: samples[f"bare {product}"] for product in winners}
    limit = _limit(case, bare)
    if bare:
        speeds = "; ".join(
            f"{product}: {winners[product].how} {_gflops(case, 1, found):.0f} GFLOP/s"
            for product, found in bare.items()
            if product in case.products
        )
        count = sum(case.products.values())
        row = blank_row(case, LIMIT, "ok") | _summary(case, limit, limit)
        yield row | {"products": count, "products_used": speeds}
    for name, (row, variant) in rows.items():
        taken = samples[name]
        row |= _summary(case, taken, limit)
        if bare and (count := variant.products(case)) is not None:
            again = count - sum(case.products.values())
            own = [
                Sample(*(t + again * f for t, f in zip(least, forward, strict=True)))
                for least, forward in zip(limit, bare["forward"], strict=True)
            ]
            row["products"] = round(count, 2)
            row["ratio_own"], row["ratio_own_cpu"] = _ratio(taken, own, 0), _ratio(taken, own, 1)
        yield row


def _unavoidable(case: Case, inputs: Any, device: Cpu) -> dict[str, products.Winner]:
    """What the limit counts: the bare products; inside a trainer also both models without heads."""
    found = products.choose(case, device)
    if case.step == "trl":
        found["layers"] = products.Winner("", trl_step.layers_alone(inputs))
    return found


def _laps(step: Step, inputs: Any) -> list[Call]:
    """Forward and backward as two calls."""
    held: list[Any] = []
    return [lambda: held.append(step(inputs)[0]), lambda: held.pop().backward()]


def _limit(case: Case, bare: dict[str, list[Sample]]) -> list[Sample]:
    """Per round: the sum of the case's products (and of the layers, once), and of its forward
    products."""
    found = []
    for of_round in zip(*bare.values(), strict=True):
        counted = [(case.products.get(p, 1), s) for p, s in zip(bare, of_round, strict=True)]
        wall, cpu = (sum(n * s[field] for n, s in counted) for field in (0, 1))
        found.append(Sample(wall, cpu, case.models * counted[0][1].wall))
    return found


def _summary(case: Case, taken: list[Sample], limit: list[Sample]) -> Row:
    """Medians and quartiles; ratios to the limit where there is one."""
    walls = [s.wall for s in taken]
    row = {
        "rounds": len(taken), "wall_s": statistics.median(walls), "wall_min_s": min(walls),
        "wall_q1_s": quartile(walls, 1), "wall_q3_s": quartile(walls, 3),
        "cpu_s": statistics.median(s.cpu for s in taken),
        "forward_s": statistics.median(s.first for s in taken),
    }  # fmt: skip
    if limit:
        ratios = [a.wall / b.wall for a, b in zip(taken, limit, strict=True)]
        row |= {
            "ratio": statistics.median(ratios), "ratio_q1": quartile(ratios, 1),
            "ratio_q3": quartile(ratios, 3), "ratio_cpu": _ratio(taken, limit, 1),
        }  # fmt: skip
    if limit and case.step != "trl":  # whose layers are neither products of the head nor forward
        row["ratio_forward"] = _ratio(taken, limit, 2)
        row["gflops"] = _gflops(case, sum(case.products.values()), taken)
    return row


def _ratio(taken: list[Sample], limit: list[Sample], field: int) -> float:
    """Formed within each round, then the median taken."""
    return statistics.median(a[field] / b[field] for a, b in zip(taken, limit, strict=True))


def _gflops(case: Case, count: int, taken: list[Sample]) -> float:
    return count * case.flops_per_product / 1e9 / statistics.median(s.wall for s in taken)


# ---- memory --------------------------------------------------------------------------------------
def memory_columns(peak: float, variant: Variant, case: Case, inputs: Any) -> Row:
    peak, gradients, kept = (
        x / MIB for x in (peak, inputs.gradient_bytes, variant.kept_bytes(case))
    )
    return {
        "peak_mib": peak, "gradients_mib": gradients, "kept_mib": kept,
        "beyond_mib": peak - gradients - kept,
    }  # fmt: skip


def memory_row(case: Case, variant: Variant, device: Cpu) -> Row:
    """Peak resident memory of one step above the inputs, MiB. Meant for a fresh process on a CPU.

    The kernel's high-water mark is reset before the step (/proc/self/clear_refs), so nothing is
    sampled. Libraries are loaded by a tiny step first. The level before the first full step counts,
    so that buffers a variant keeps between calls are part of its peak; a compiled variant is
    counted from after its first call, because compiling itself takes hundreds of MiB. Growth of
    file-backed pages (code of libraries) is left out.
    """
    torch.set_num_threads(case.threads)
    inputs = inputs_of(case, device)
    if not variant.compiled:
        small = case.resized("tiny")
        tiny = inputs_of(small, device)
        _run(variant.build(small, tiny), tiny)
    step = variant.build(case, inputs)
    before = _level()
    _reset_peak()
    _run(step, inputs)
    if variant.compiled:
        before = _level()
    _reset_peak()
    _run(step, inputs)
    after = _status()
    pages = after["RssFile"] + after["RssShmem"] - before["RssFile"] - before["RssShmem"]
    return memory_columns(after["VmHWM"] - before["VmRSS"] - max(pages, 0), variant, case, inputs)


def _run(step: Step, inputs: Any) -> None:
    inputs.clear()
    step(inputs)[0].backward()
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
