"""The head benchmark: every case, every variant, each measured in a process of its own.

`python -m benchmarks.bench_linear_logps` takes the options of `python -m benchmarks`.
"""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import harness, machine, oracle
from .cases import CASES, Case, make_inputs
from .harness import COLUMNS, LIMIT, Row, blank_row
from .peers import VARIANTS
from .variants import Variant

Say = Callable[[str], None]


class Results:
    """Rows on their way to a CSV file: written as they come, so an interrupted run keeps them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)

    def add(self, rows: Iterable[Row]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="raise")
            for row in rows:
                writer.writerow({k: _cell(v) for k, v in (row | machine.describe()).items()})


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else value


def serving(case: Case, names: Sequence[str]) -> list[Variant]:
    """The chosen variants that implement the case's step."""
    return [VARIANTS[name] for name in names if case.step in VARIANTS[name].steps]


def run_case(
    case: Case, size: str, names: Sequence[str], rounds: int, memory: bool, say: Say
) -> list[Row]:
    """One case in worker processes; a worker that dies leaves rows that say how."""
    small = case.resized(size)
    variants = serving(small, names)
    with tempfile.TemporaryDirectory(prefix="prefkern-bench-") as folder:
        truth = Path(folder) / "truth.pt"
        say(f"{case.name}: float64 reference of {small.scored} rows")
        torch.save(tuple(oracle.evaluate(small, make_inputs(small))), truth)
        spec = {
            "case": case.name, "size": size, "threads": case.threads, "rounds": rounds,
            "truth": str(truth), "variants": [v.name for v in variants],
        }  # fmt: skip
        say(f"{case.name}: {len(variants)} variants, {rounds} rounds, {case.threads} thread(s)")
        rows, failure = run_worker({**spec, "mode": "time"}, Path(folder))
        if failure:
            rows = [
                blank_row(small, name, "failed", failure) for name in (LIMIT, *spec["variants"])
            ]
        for row in rows:
            if not memory or row["status"] != "ok" or row["variant"] == LIMIT:
                continue
            say(f"{case.name}: memory of {row['variant']}")
            one = {**spec, "mode": "memory", "variants": [row["variant"]]}
            measured, failure = run_worker(one, Path(folder))
            row |= measured[0] if measured else {"reason": f"memory not measured: {failure}"}
    return with_versions(rows)


def with_versions(rows: list[Row]) -> list[Row]:
    for row in rows:
        if row["variant"] in VARIANTS:
            package = VARIANTS[row["variant"]].package
            row |= {"package": package, "version": machine.version(package)}
    return rows


def run_worker(spec: dict[str, Any], folder: Path) -> tuple[list[Row], str]:
    """(rows, "") or ([], how the process ended)."""
    spec_file, out_file = folder / "spec.json", folder / "out.json"
    spec_file.write_text(json.dumps(spec))
    out_file.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker", str(spec_file), str(out_file)],
        cwd=machine.ROOT,
        env=harness.worker_environment(spec["threads"], keep_memory=spec["mode"] == "time"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return json.loads(out_file.read_text()), ""
    if done.returncode < 0:
        return [], f"the process ended by {signal.Signals(-done.returncode).name}"
    last = done.stdout.strip().splitlines()[-1:] or ["no output"]
    return [], f"the process ended with status {done.returncode}: {last[0]}"


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text: what a person reads while the benchmark runs."""
    head = (
        "variant",
        "wall s",
        "cpu s",
        "ratio",
        "(cpu)",
        "own",
        "(cpu)",
        "peak MiB",
        "beyond",
        "loss",
        "dH",
        "dW",
    )
    keys = (
        ("wall_s", ".3f"), ("cpu_s", ".3f"), ("ratio", ".2f"), ("ratio_cpu", ".2f"),
        ("ratio_own", ".2f"), ("ratio_own_cpu", ".2f"), ("peak_mib", ".0f"),
        ("beyond_mib", ".1f"), ("err_loss", ".0e"), ("err_d_hidden", ".0e"),
        ("err_d_weight", ".0e"),
    )  # fmt: skip
    lines = [f"{head[0]:<28}" + "".join(f"{h:>10}" for h in head[1:])]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['variant']:<28}  {row['status']}: {row['reason']}")
            continue
        cells = [format(row[k], f) if row.get(k) not in (None, "") else "" for k, f in keys]
        note = row.get("products_used") or row["reason"]
        lines.append(f"{row['variant']:<28}" + "".join(f"{c:>10}" for c in cells) + f"  {note}")
    return "\n".join(lines)


def run(
    *,
    out: Path,
    size: str = "full",
    cases: Sequence[str] = tuple(CASES),
    variants: Sequence[str] = tuple(VARIANTS),
    threads: Sequence[int] | None = None,
    rounds: int = 5,
    memory: bool = True,
    say: Say = print,
) -> Path:
    """Measures and writes `out`/linear_logps.csv; returns its path.

    Args:
        size: "full", "quick" (1/32 of the work) or "tiny" (smoke test).
        threads: Keep the cases with one of these thread counts. Default: all.
    """
    results = Results(out / "linear_logps.csv")
    chosen = [CASES[name] for name in cases if not threads or CASES[name].threads in threads]
    for case in chosen:
        rows = run_case(case, size, variants, rounds, memory, say)
        results.add(rows)
        say(f"\n{case.name} ({case.why}), {case.resized(size).shape}\n{table(rows)}\n")
    return results.path


if __name__ == "__main__":
    from .__main__ import main

    sys.exit(main())
