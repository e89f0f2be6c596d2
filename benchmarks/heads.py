"""The head benchmark: every case, every variant, each case measured in a process of its own.

Compiled code and OpenMP fix the thread count at first use, hence a process per case; on a CPU every
memory figure has one too. `python -m benchmarks.heads SPEC OUT` is such a process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import measure, process, results
from .cases import CASES, Case
from .peers import VARIANTS
from .results import LIMIT, Row, blank_row
from .timing import device_of
from .variants import Variant

Say = Callable[[str], None]


def serving(case: Case, device: str, names: Sequence[str] = tuple(VARIANTS)) -> list[Variant]:
    """The chosen variants that implement the case's step on the device."""
    return [VARIANTS[name] for name in names if VARIANTS[name].serves(case, device)]


def run_case(
    case: Case, size: str, device: str, names: Sequence[str], rounds: int, memory: bool, say: Say
) -> list[Row]:
    """One case in worker processes; a worker that dies leaves rows that say how."""
    small = case.resized(size)
    variants = serving(small, device, names)
    with tempfile.TemporaryDirectory(prefix="prefkern-bench-") as folder:
        spec = {
            "case": case.name, "size": size, "device": device, "rounds": rounds,
            "variants": [v.name for v in variants], "mode": "time",
        }  # fmt: skip
        say(f"{case.name}: {len(variants)} variants, {rounds} rounds on {device}")
        rows, failure = run_worker(spec, case.threads, Path(folder))
        if failure:
            rows = [
                blank_row(small, name, "failed", failure) for name in (LIMIT, *spec["variants"])
            ]
        for row in rows:
            if not memory or row["status"] != "ok" or row["variant"] == LIMIT or device != "cpu":
                continue
            say(f"{case.name}: memory of {row['variant']}")
            one = {**spec, "mode": "memory", "variants": [row["variant"]]}
            measured, failure = run_worker(one, case.threads, Path(folder))
            row |= measured[0] if measured else {"reason": f"memory not measured: {failure}"}
    return with_versions(rows)


def with_versions(rows: list[Row]) -> list[Row]:
    for row in rows:
        if row["variant"] in VARIANTS:
            package = VARIANTS[row["variant"]].package
            row |= {"package": package, "version": results.version(package)}
    return rows


def run_worker(spec: dict[str, Any], threads: int, folder: Path) -> tuple[list[Row], str]:
    """(rows, "") or ([], how the process ended)."""
    spec_file, out_file = folder / "spec.json", folder / "out.json"
    keep_memory = spec["mode"] == "time" and CASES[spec["case"]].keep_memory
    spec_file.write_text(json.dumps(spec))
    out_file.unlink(missing_ok=True)
    ended = process.run(
        [sys.executable, "-m", "benchmarks.heads", str(spec_file), str(out_file)],
        env=process.worker_environment(threads, keep_memory),
    )
    if ended.status != 0:
        return [], ended.why
    return json.loads(out_file.read_text()), ""


def work(spec: dict[str, Any]) -> list[Row]:
    case, device = CASES[spec["case"]].resized(spec["size"]), device_of(spec["device"])
    variants = [VARIANTS[name] for name in spec["variants"]]
    if spec["mode"] == "memory":
        return [measure.memory_row(case, variants[0], device)]
    rows = measure.time_case(case, variants, device, spec["rounds"])
    return [row | {"gpu": device.describe()["gpu"]} for row in rows]


def run(
    *,
    out: Path,
    size: str = "full",
    device: str = "cpu",
    cases: Sequence[str],
    variants: Sequence[str] = tuple(VARIANTS),
    threads: Sequence[int] | None = None,
    rounds: int = 5,
    memory: bool = True,
    say: Say = print,
) -> Path:
    """Measures and writes `out`/linear_logps.csv; returns its path.

    Rows that the file has of other cases stay.

    Args:
        size: "full", "quick" (1/32 of the work) or "tiny" (smoke test).
        threads: Keep the cases with one of these thread counts. Default: all.
    """
    chosen = [CASES[name] for name in cases if not threads or CASES[name].threads in threads]
    table = results.Table(out / "linear_logps.csv", again={case.name for case in chosen})
    for case in chosen:
        rows = run_case(case, size, device, variants, rounds, memory, say)
        table.add(rows)
        say(f"\n{case.name} ({case.why}), {case.resized(size).shape}\n{results.text_table(rows)}\n")
    return table.path


if __name__ == "__main__":
    spec_file, out_file = (Path(argument) for argument in sys.argv[1:])
    out_file.write_text(json.dumps(work(json.loads(spec_file.read_text()))))
