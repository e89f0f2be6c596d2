"""Losses and host overhead: the costs that must stay invisible beside the head.

A loss reads [S] numbers, so its time must not depend on tokens or vocabulary; `run` times every
loss of prefkern.LOSSES, forward and backward, at a few S. `run_host_overhead` runs the
pytest-benchmark rows of host_overhead/, tiny calls whose time is all Python, dispatch and autograd.
"""

from __future__ import annotations

import csv
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import prefkern
from prefkern.losses.record import Loss
from prefkern.stats import SeqStats

from . import harness, machine

SEQUENCES = {"full": (16, 256, 4096), "quick": (16, 256), "tiny": (8,)}
FAMILIES = ("pairwise", "pointwise", "listwise")
GROUP = 4  # answers of one list
OBJECTIVE_COLUMNS = ("loss", "family", "S", "us_median", "us_min", "rounds")
HOST_COLUMNS = ("what", "us_median", "us_min", "us_iqr", "rounds", "times_torch")


def statistics_of(n: int, g: torch.Generator) -> SeqStats:
    """Every field of SeqStats for n sequences of about 200 tokens, fp64 leaves."""

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(n, generator=g, dtype=torch.float64)

    length = torch.randint(100, 300, (n,), generator=g).double()
    ref_logp = -2.0 * length
    fields = {
        name: (0.01 * length + noise(0.1)).abs().requires_grad_(True)
        for name in SeqStats._fields
        if name not in ("logp", "ref_logp", "length")
    }
    logp = (ref_logp + noise(2.0)).requires_grad_(True)
    return SeqStats(logp=logp, ref_logp=ref_logp, length=length, **fields)


def example(record: Loss, n: int) -> Callable[[], Tensor]:
    """A call of the loss on n sequences, and the leaves its backward fills."""
    g = torch.Generator().manual_seed(0)
    if record.family == "listwise":
        size = max(n // GROUP, 1)
        seq = statistics_of(size * GROUP, g)
        scores = getattr(seq, record.score).detach().requires_grad_(True)
        inputs: list[object] = [scores]
        items = size * GROUP
        given = {
            "labels": torch.randint(0, 4, (items,), generator=g).double(),
            "cu_groups": torch.arange(0, items + 1, GROUP, dtype=torch.int32),
        }
    else:
        roles = record.rows if record.family == "pairwise" else ("seq",)
        items = max(n // len(roles), 1)
        inputs = [statistics_of(items, g) for _ in roles]
        seq, given = inputs[0], {}
    parameters = inspect.signature(record.fn).parameters
    for name in record.extra:
        if name in SeqStats._fields:
            given[name] = getattr(seq, name).detach()
        elif parameters[name].default is inspect.Parameter.empty:
            given[name] = EXTRA[name](items, g)
    return lambda: record(*inputs, **given)


def _normal(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g, dtype=torch.float64)


# Tensors a caller must supply, for n items. A loss that needs another one is left out by name.
EXTRA: dict[str, Callable[[int, torch.Generator], object]] = {
    "label": lambda n, g: torch.arange(n) % 2 == 0,
    "keep": lambda n, g: torch.arange(n) % 2 == 0,
    "pref_prob": lambda n, g: torch.full((n,), 0.7, dtype=torch.float64),
    "delta": lambda n, g: 0.1,
    "kl_baseline": lambda n, g: 0.1,
    "rm_margin": _normal,
    "mix_chosen_logps": _normal,
    "mix_rejected_logps": _normal,
    "baseline_mean_logps": _normal,
    "margin_reward_chosen": lambda n, g: _normal(n, g)[:, None],
    "margin_reward_rejected": lambda n, g: _normal(n, g)[:, None],
    "topk": lambda n, g: 2,
    "pairs": lambda n, g: torch.stack([torch.arange(n), torch.arange(n) ^ 1], 1),
    "slow_chosen_logps": _normal,
    "slow_rejected_logps": _normal,
    "source_chosen_mean_logps": lambda n, g: _normal(n, g)[:, None],
    "source_rejected_mean_logps": lambda n, g: _normal(n, g)[:, None],
    "judge_logit_gap": _normal,
    "log_target_prob": _normal,
}


def run(out: Path, size: str, rounds: int) -> Path:
    """Writes `out`/objective.csv: microseconds of each loss with its backward."""
    torch.set_num_threads(1)
    known = {*SeqStats._fields, *EXTRA}
    calls = {
        (name, n): example(record, n)
        for name, record in prefkern.LOSSES.items()
        if record.family in FAMILIES and known.issuperset(record.extra)
        for n in SEQUENCES[size]
    }
    if left_out := sorted(set(prefkern.LOSSES) - {name for name, _ in calls}):
        print(f"losses without an example here: {', '.join(left_out)}")
    # a loss that is its likelihood term alone (sft) has nothing to time here
    calls = {key: call for key, call in calls.items() if call().requires_grad}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for i in range(10 * rounds + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call().sum().backward()
            if i > 0:  # the first call imports and caches
                times[key].append(1e6 * (time.perf_counter() - start))
    rows = [
        (name, prefkern.LOSSES[name].family, n, statistics.median(t), min(t), len(t))
        for (name, n), t in times.items()
    ]
    path = out / "objective.csv"
    _write(path, OBJECTIVE_COLUMNS, rows)
    for n in SEQUENCES[size]:
        median = statistics.median(row[3] for row in rows if row[2] == n)
        slowest = max((row for row in rows if row[2] == n), key=lambda row: row[3])
        print(
            f"losses, S={n}: median {median:.0f} us with backward, "
            f"slowest {slowest[0]} {slowest[3]:.0f} us"
        )
    return path


def run_host_overhead(out: Path) -> Path:
    """Runs host_overhead/ under pytest-benchmark and writes `out`/host_overhead.csv.

    Raises:
        RuntimeError: pytest failed.
    """
    folder = Path(__file__).with_name("host_overhead")
    with tempfile.TemporaryDirectory(prefix="prefkern-bench-") as scratch:
        record = Path(scratch) / "host.json"
        command = [
            sys.executable, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider",
            "--benchmark-only", f"--benchmark-json={record}",
            "--benchmark-columns=median,iqr,rounds",
        ]  # fmt: skip
        # Outside the root, whose folder `kernels` would be importable.
        done = subprocess.run(command, cwd=scratch, env=harness.worker_environment(1), check=False)
        if done.returncode:
            raise RuntimeError(
                f"the host-overhead benchmarks failed (pytest ended with {done.returncode})."
            )
        found = json.loads(record.read_text())["benchmarks"]
    rows = []
    torch_median = {
        b["name"].removeprefix("test_torch_"): b["stats"]["median"]
        for b in found
        if b["name"].startswith("test_torch_")
    }
    for b in found:
        s = b["stats"]
        name = b["name"].removeprefix("test_")
        base = torch_median.get(name.partition("[")[0])
        times = s["median"] / base if base else ""
        rows.append((name, 1e6 * s["median"], 1e6 * s["min"], 1e6 * s["iqr"], s["rounds"], times))
    path = out / "host_overhead.csv"
    _write(path, HOST_COLUMNS, rows)
    return path


def _write(path: Path, columns: tuple[str, ...], rows: list[tuple]) -> None:
    where = machine.describe()
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator=os.linesep)
        writer.writerow([*columns, *where])
        for row in rows:
            cells = [f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row]
            writer.writerow([*cells, *where.values()])
