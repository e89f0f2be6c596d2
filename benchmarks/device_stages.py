"""The stages of device_check.py that run in a process that may die: each writes rows to a log.

A stage takes what its `Stage` holds and asks it before every row, so that it ends in time and goes
on behind the row that ended an earlier process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from . import heads as head_runs
from . import inside, measure, model
from . import small as checks
from .cases import GPU_FIRST, GROUPS
from .results import LIMIT, Log, Row, read_log
from .timing import Call, Cpu
from .variants import Variant

BACKENDS = ("triton", "cuda")


@dataclass
class Stage:
    """What a stage works with, in the process that runs it."""

    out: Path
    smoke: bool
    deadline: float
    log: Log
    device: Cpu

    def each(self, *key: str) -> bool:
        """Whether to try the next row: there is time, and it has none yet."""
        return time.monotonic() < self.deadline and self.log.trying(*key)

    def backends(self, op: str) -> list[str]:
        """Backends of which `small` found nothing of an op wrong."""
        rows = [r for r in read_log(self.out / "rows.jsonl") if r["stage"] == "small"]
        bad = {r["key"][0].split()[0] for r in rows if r["status"] != "ok" and op in r["key"][0]}
        return [name for name in BACKENDS if name not in bad]

    def problem(self, op: str) -> tuple[str, str, torch.dtype]:
        return op, self.device.tensors, torch.bfloat16

    def timed(self, key: tuple[str, ...], make: Callable[[], Row]) -> None:
        """One row; whatever it raises is its row."""
        if not self.each(*key):
            return
        try:
            row = {"status": "ok", **make()}
        except Exception as error:
            row = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        self.log.add(key, row)
        self.device.check()


def small(s: Stage) -> None:
    """Every statistic, gradient, list family and sum against float64."""
    for backend in BACKENDS:
        for name, row in checks.run(backend, s.device.tensors, s.each):
            s.log.add((name,), row)
            s.device.check()


def ceilings(s: Stage) -> None:
    """What the card can do: every ratio is read beside these."""
    n, d, w, square = (64, 32, 128, 64) if s.smoke else (8192, 4096, 16384, 8192)
    make = partial(torch.randn, device=s.device.tensors)
    bf16, fp32 = torch.bfloat16, torch.float32

    def copy() -> Row:
        source = make((1 << 16) if s.smoke else (1 << 30))
        target = torch.empty_like(source)
        seconds = s.device.replayed(lambda: target.copy_(source), repeats=1)
        return {"tb_per_s": 8 * source.numel() / seconds / 1e12}

    def product(flops: float, call: Call) -> Row:
        return {"tflops": flops / s.device.replayed(call, repeats=3) / 1e12}

    s.timed(("copy",), copy)
    a, b = make(square, square, dtype=bf16), make(square, square, dtype=bf16)
    square_out = torch.empty_like(a)
    s.timed(
        (f"mm {square}",), lambda: product(2 * square**3, lambda: torch.mm(a, b, out=square_out))
    )
    h, weight, dz = make(n, d, dtype=bf16), make(w, d, dtype=bf16), make(n, w, dtype=bf16)
    z, z32, total = torch.empty_like(dz), dz.float(), make(n, d)
    flops = 2.0 * n * d * w
    for name, call in {
        "forward bf16": lambda: torch.mm(h, weight.T, out=z),
        "forward out fp32": lambda: torch.mm(h, weight.T, out_dtype=fp32, out=z32),
        "dW bf16": lambda: torch.mm(dz.T, h),
        "dH bf16": lambda: torch.mm(dz, weight),
        "dH added in fp32": lambda: torch.addmm(total, dz, weight, out_dtype=fp32, out=total),
    }.items():
        s.timed((f"{name} {n} x {w} x {d}",), lambda call=call: product(flops, call))


def kernels(s: Stage) -> None:
    """Folds and gradients alone, replayed: what a step pays beside its products."""
    on = [b for b in s.backends("linear") if not inside.reasons(b, *s.problem("linear_divergence"))]
    for m, w in ((16, 256),) if s.smoke else model.TILES:
        for kernel in inside.KERNELS:
            for backend in on:

                def one(kernel=kernel, backend=backend, m=m, w=w) -> Row:
                    call = inside.kernel_call(kernel, backend, m, w, s.device.tensors)
                    seconds = s.device.replayed(call, rounds=3)
                    moved = model.KernelCounts(backend).numbers[kernel.name, "bytes"] * m * w
                    return {"us": 1e6 * seconds, "tb_per_s": moved / seconds / 1e12}

                s.timed((f"{kernel.name} {m} x {w}", f"prefkern {backend}"), one)


def _cases(s: Stage, cases, chosen: Callable[[Variant], bool], rounds: int = 7) -> None:
    for case in cases:
        sized = case.resized("tiny") if s.smoke else case
        right = [f"prefkern {name}" for name in (*s.backends("linear"), "eager")]
        variants = [
            v for v in head_runs.serving(sized, s.device.kind)
            if chosen(v) and (v.name.split(",")[0] in right or not v.name.startswith("prefkern"))
        ]  # fmt: skip
        variants.sort(key=lambda v: (v.compiled, v.logits))  # what takes longest comes last
        names = [(case.name, name) for name in (LIMIT, *(v.name for v in variants))]
        if s.log.done.issuperset(names) or time.monotonic() > s.deadline:
            continue

        def trying(name: str, case=case) -> bool:
            # products are timed for whatever has been prepared, late or not
            return s.log.trying(case.name, name) if name == LIMIT else s.each(case.name, name)

        for row in measure.time_case(sized, variants, s.device, 2 if s.smoke else rounds, trying):
            s.log.add((case.name, row["variant"]), *head_runs.with_versions([row]))


def heads(s: Stage) -> None:
    _cases(s, GPU_FIRST[:3] if s.smoke else GPU_FIRST, _ours)


def _ours(variant) -> bool:
    return variant.name.startswith("prefkern") and not variant.logits


def lists(s: Stage) -> None:
    """Ranking kernels replayed, beside a replayed padded eager version."""
    groups, few = (2, 2) if s.smoke else (model.LIST_GROUPS, 1000)
    allowed = ("eager", *s.backends("list_rank"))
    for backend, family, calls in inside.list_calls(groups, few, s.device.tensors):
        if backend in allowed:
            s.timed(
                (f"{family} {groups} x 16", f"prefkern {backend}"),
                lambda calls=calls: inside.measure_lists(s.device, calls, 1 if s.smoke else 7),
            )


def peers(s: Stage) -> None:
    """Everybody who is installed on the target shape; full logits and torch.compile here alone."""
    cases = [c for c in GROUPS["gpu"].values() if c.shape.model == "target"]
    chosen = [c for c in cases if c.step in ("logp", "ce") and not c.frozen and c.share is None]
    if s.smoke:
        _cases(s, chosen[:1], lambda v: not _ours(v) and not v.compiled)
        return
    best = tuple(f"prefkern {name}, budget 8 GiB" for name in BACKENDS)
    _cases(s, chosen[:1], lambda v: not _ours(v))
    _cases(s, chosen[1:], lambda v: (not _ours(v) and not v.logits) or v.name in best)


def more(s: Stage) -> None:
    """The other heads and shapes."""
    rest = [c for c in GROUPS["gpu"].values() if c not in GPU_FIRST and c.step != "ce"]
    _cases(s, rest[:1] if s.smoke else rest, lambda v: not v.logits, rounds=5)
