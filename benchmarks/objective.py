"""Losses and host overhead: the costs that must stay invisible beside the head.

A loss reads [S] numbers, so its time must not depend on tokens or vocabulary; `run` times every
loss of prefkern.LOSSES, forward and backward, at a few S. `run_host_overhead` runs the
pytest-benchmark rows of host_overhead/, tiny calls whose time is all Python, dispatch and autograd.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
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

from . import process
from .results import Row, Table

SEQUENCES = {"full": (16, 256, 4096), "quick": (16, 256), "tiny": (8,)}
FAMILIES = ("pairwise", "pointwise", "listwise")
GROUP = 4  # answers of one list
OBJECTIVE_COLUMNS = ("loss", "family", "S", "us_median", "us_min", "rounds")
HOST_COLUMNS = ("what", "us_median", "us_min", "us_iqr", "rounds", "times_torch")


def statistics_of(n: int, g: torch.Generator) -> SeqStats:
    """Every field of SeqStats for n sequences of about 200 tokens, fp64 leaves."""
    length = torch.randint(100, 300, (n,), generator=g).double()
    fields = {
        name: (0.01 * length + 0.1 * _normal(n, g)).abs().requires_grad_(True)
        for name in SeqStats._fields
    }
    logp = (-2.0 * length + 2.0 * _normal(n, g)).requires_grad_(True)
    return SeqStats(**fields | {"logp": logp, "ref_logp": -2.0 * length, "length": length})


def example(record: Loss, n: int) -> Callable[[], Tensor]:
    """A call of the loss on n sequences."""
    g = torch.Generator().manual_seed(0)
    given: dict[str, object] = {}
    if record.family == "listwise":
        items = max(n // GROUP, 1) * GROUP
        seq = statistics_of(items, g)
        inputs: list[object] = [getattr(seq, record.score).detach().requires_grad_(True)]
        given["relevance"] = torch.randint(0, 4, (items,), generator=g).double()
        given["cu_groups"] = torch.arange(0, items + 1, GROUP, dtype=torch.int32)
    else:
        roles = record.rows if record.family == "pairwise" else ("seq",)
        items = max(n // len(roles), 1)
        inputs = [statistics_of(items, g) for _ in roles]
        seq = inputs[0]
    parameters = inspect.signature(record.fn).parameters
    for name in record.extra:
        if name in SeqStats._fields:
            given[name] = getattr(seq, name).detach()
        elif parameters[name].default is inspect.Parameter.empty:
            given[name] = EXTRA[name](items, g)
    return lambda: record(*inputs, **given)


def _normal(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g, dtype=torch.float64)


# What a caller must supply, for n items. A loss that needs another one is left out by name.
EXTRA: dict[str, Callable[[int, torch.Generator], object]] = {
    **dict.fromkeys(("label", "keep"), lambda n, g: torch.arange(n) % 2 == 0),
    **dict.fromkeys(("delta", "kl_baseline"), lambda n, g: 0.1),
    **dict.fromkeys(
        ("rm_margin", "baseline_mean_logps",
         "slow_chosen_logps", "slow_rejected_logps", "judge_logit_gap", "log_target_prob"),
        _normal,
    ),
    **dict.fromkeys(
        ("margin_reward_chosen", "margin_reward_rejected", "source_chosen_mean_logps",
         "source_rejected_mean_logps"),
        lambda n, g: _normal(n, g)[:, None],
    ),
    "pref_prob": lambda n, g: torch.full((n,), 0.7, dtype=torch.float64),
    "topk": lambda n, g: 2,
    "pairs": lambda n, g: torch.stack([torch.arange(n), torch.arange(n) ^ 1], 1),
}  # fmt: skip


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
    for _ in range(10 * rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            call().sum().backward()
            times[key].append(1e6 * (time.perf_counter() - start))
    rows: list[Row] = [
        {
            "loss": name, "family": prefkern.LOSSES[name].family, "S": n,
            "us_median": statistics.median(t), "us_min": min(t), "rounds": len(t),
        }
        for (name, n), t in times.items()
    ]  # fmt: skip
    table = Table(out / "objective.csv", OBJECTIVE_COLUMNS)
    table.add(rows)
    for n in SEQUENCES[size]:
        these = {row["us_median"]: row["loss"] for row in rows if row["S"] == n}
        print(
            f"losses, S={n}: median {statistics.median(these):.0f} us with backward, "
            f"slowest {these[max(these)]} {max(these):.0f} us"
        )
    return table.path


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
        ended = process.run(command, env=process.worker_environment(1), cwd=scratch)
        print(ended.text)
        if ended.status != 0:
            raise RuntimeError(f"the host-overhead benchmarks failed: {ended.why}")
        found = json.loads(record.read_text())["benchmarks"]
    stats = {re.search(r"\[(.*)-(.*)\]", b["name"]).groups(): b["stats"] for b in found}
    table = Table(out / "host_overhead.csv", HOST_COLUMNS)
    for (name, backend), s in stats.items():
        base = stats.get((name, "torch")) if backend != "torch" else None
        row = {f"us_{k}": 1e6 * s[k] for k in ("median", "min", "iqr")}
        row |= {"what": f"{name} [{backend}]", "rounds": s["rounds"]}
        table.add([row | {"times_torch": base and s["median"] / base["median"]}])
    return table.path
