"""End-to-end table of the head ops: time over bare products, memory, error against float64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import timing
from .cases import Case, Inputs, Truth, make_inputs, make_truth, relative_error
from .variants import VARIANTS, Forward, Variant

MIB = 1 << 20
# A result further from float64 than this is a wrong result and is not timed. A small KL of logits
# rounded to 16 bits is off by half without being wrong; the table shows by how much.
KL_BOUND = 0.6
ERROR_BOUND = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-4}
SPARE_BYTES = 8 << 30


def bare_products(case: Case, x: Inputs, columns: int = 8192) -> dict[str, Callable[[], None]]:
    """The products that the step cannot avoid, tile by tile into reused buffers, nothing else."""
    h, w, n, v = x.hidden.detach(), x.weight.detach(), case.N, case.head.V
    tile = h.new_empty(n, min(columns, v))
    tile.normal_()
    d_hidden, d_weight = torch.empty_like(h), torch.empty_like(w)

    def spans():
        return ((a, min(a + columns, v)) for a in range(0, v, columns))

    def forward() -> None:
        for a, b in spans():
            torch.mm(h, w[a:b].T, out=tile[:, : b - a])

    def to_hidden() -> None:
        for a, b in spans():
            d_hidden.addmm_(tile[:, : b - a], w[a:b], beta=float(a > 0))

    def to_weight() -> None:
        for a, b in spans():
            torch.mm(tile[:, : b - a].T, h, out=d_weight[a:b])

    products = {"forward": forward, "d_hidden": to_hidden}
    return products if case.frozen else products | {"d_weight": to_weight}


def step_of(forward: Forward, x: Inputs) -> Callable[[], dict[str, Tensor]]:
    def step() -> dict[str, Tensor]:
        x.clear()
        found = forward(x)
        total = sum((found[s].float() * c).sum() for s, c in x.upstream.items())
        total.backward()
        return found

    return step


def errors(case: Case, x: Inputs, found: dict[str, Tensor], truth: Truth) -> dict[str, float]:
    got = {f"err_{s}": relative_error(found[s].detach(), truth.values[s]) for s in truth.values}
    got["err_d_hidden"] = relative_error(x.hidden.grad[truth.rows], truth.d_hidden)
    if truth.d_weight is not None:
        got["err_d_weight"] = relative_error(x.weight.grad[truth.columns], truth.d_weight)
    return got


def fits(variant: Variant, case: Case, device: str) -> bool:
    if device != "cuda" or not variant.logits:
        return True
    need = variant.logits * case.models * case.N * case.head.V
    return need < torch.cuda.mem_get_info()[0] - SPARE_BYTES


def measure_case(case: Case, device: str, rounds: int, deadline: float) -> list[dict]:
    """Rows of one case: every variant that is there, fits and is right."""
    x = make_inputs(case, device)
    truth = make_truth(case, x)
    rows: dict[str, dict] = {}
    runs: dict[str, Callable[[], object]] = {}
    for variant in VARIANTS:
        row = {
            "case": case.name, "model": case.head.model, "step": case.step, "N": case.N,
            "D": case.head.D, "V": case.head.V, "frozen": case.frozen, "variant": variant.name,
        }  # fmt: skip
        rows[variant.name] = row
        if case.step not in variant.steps:
            row["status"] = "has no such step"
        elif variant.compiled and device != "cuda":
            row["status"] = "not compiled without a GPU"
        elif not fits(variant, case, device):
            row["status"] = "its logits do not fit"
        elif time.monotonic() > deadline:
            row["status"] = "no time left"
        else:
            row["status"] = prepare(variant, case, device, x, truth, row, runs)
    bare = bare_products(case, x)
    runs |= {f"bare {name}": run for name, run in bare.items()}
    seconds = timing.interleaved(runs, device, rounds, warm=1)
    forward = [case.models * t for t in seconds["bare forward"]]
    backward = [seconds[f"bare {name}"] for name in bare if name != "forward"]
    least = [sum(parts) for parts in zip(forward, *backward, strict=True)]
    again = [a + f for a, f in zip(least, forward, strict=True)]
    count = case.models + len(backward)
    for name, row in rows.items():
        if name not in seconds:
            continue
        taken = seconds[name]
        row["ms"] = 1e3 * statistics.median(taken)
        row["over_bare"] = timing.median_ratio(taken, least)
        row["over_bare_recomputed"] = timing.median_ratio(taken, again)
        row["tflops"] = count * case.flops_per_product / statistics.median(taken) / 1e12
    limit = {"case": case.name, "variant": "bare products", "status": "ok"}
    limit |= {"ms": 1e3 * statistics.median(least), "products": count}
    limit |= {f"ms_{n}": 1e3 * statistics.median(seconds[f"bare {n}"]) for n in bare}
    return [limit, *rows.values()]


def prepare(
    variant: Variant,
    case: Case,
    device: str,
    x: Inputs,
    truth: Truth,
    row: dict,
    runs: dict[str, Callable[[], object]],
) -> str:
    """Runs a variant once for its error and once for its memory; registers it for timing."""
    try:
        step = step_of(variant.build(case, device), x)
        found = step()
    except ImportError as absent:
        return f"missing: {absent}"
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        # One that does not run on this machine must not end the table; its words are kept, and
        # the stage counts as failed where it is ours.
        return f"failed: {type(error).__name__}: {str(error)[:200]}"
    got = errors(case, x, found, truth)
    row.update(got)
    del found
    bound = ERROR_BOUND[case.dtype]
    wrong = {k: e for k, e in got.items() if not e <= (KL_BOUND if k == "err_fkl" else bound)}
    if wrong:
        return f"wrong: {wrong}"
    if device == "cuda":
        x.clear()
        row["peak_mib"] = timing.peak_bytes(step) / MIB
        row["gradients_mib"] = case.gradient_bytes / MIB
        row["beyond_mib"] = row["peak_mib"] - row["gradients_mib"]
    runs[variant.name] = step
    return "ok"
