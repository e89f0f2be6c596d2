"""Rows: their columns, the files they go to, the tables made of them, and where they were measured.

`python -m benchmarks.results results/linear_logps.csv ...` prints the tables as Markdown.
"""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .cases import Case

ROOT = Path(__file__).resolve().parent.parent
LIMIT = "limit (bare products)"
Row = dict[str, Any]
WHERE = ("torch", "python", "cpu", "isa", "gpu", "commit", "date")
COLUMNS = (
    "case", "step", "variant", "status", "reason", "threads", "dtype", "head", "model", "N",
    "scored", "D", "V", "pairs", "share", "rounds", "wall_s", "wall_min_s", "wall_q1_s",
    "wall_q3_s", "cpu_s", "forward_s", "ratio", "ratio_q1", "ratio_q3", "ratio_cpu",
    "ratio_forward", "products", "ratio_own", "ratio_own_cpu", "gflops", "err_loss", "err_logp",
    "err_ref_logp", "err_ent", "err_fkl", "err_rkl", "err_jsd", "err_d_hidden", "err_d_weight",
    "peak_mib", "gradients_mib", "kept_mib", "beyond_mib", "products_used", "package", "version",
    *WHERE,
)  # fmt: skip


def blank_row(case: Case, variant: str, status: str, reason: str = "") -> Row:
    return {
        "case": case.name, "step": case.step, "variant": variant, "status": status,
        "reason": " ".join(reason.split())[:300], "threads": case.threads, "dtype": case.dtype,
        "head": "frozen" if case.frozen else "trainable", "model": case.shape.model,
        "N": case.shape.N, "scored": case.scored, "D": case.shape.D, "V": case.shape.V,
        "pairs": case.shape.pairs, "share": case.share,
    }  # fmt: skip


# ---- files ---------------------------------------------------------------------------------------
class Table:
    """A CSV file of rows, written as they come, so that an interrupted run keeps them."""

    def __init__(
        self,
        path: Path,
        columns: Sequence[str] = COLUMNS,
        *,
        place: bool = True,
        again: Collection[str] | None = None,
        **where: str,
    ) -> None:
        """A new file, or with `again` the rows that a file at `path` has of other cases.

        place: every row says where it was measured; `where` replaces what describe() finds.
        again: the cases that are measured now.
        """
        self.path, self.where = path, describe() | where if place else {}
        self.columns = [*columns, *(c for c in self.where if c not in columns)]
        stay = []
        if again is not None and path.exists():
            stay = [row for row in read(path) if row["case"] not in again]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(stay)

    def add(self, rows: Iterable[Row]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="raise")
            for row in rows:
                writer.writerow({k: _cell(v) for k, v in (self.where | row).items()})


def _cell(value: object) -> object:
    if value is None or value != value:  # not measured
        return ""
    return f"{value:.5g}" if isinstance(value, float) else value


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Log:
    """Rows of a run, one JSON object a line, on disk before the next is tried.

    A row has a key. What was tried and has no row ended its process: the next process that opens
    the file gives it one that says so, and goes on with the others.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        lines = [line for line in read_log(path, tried=True) if line["stage"] == stage]
        self.done = {tuple(line["key"]) for line in lines if "tried" not in line}
        last = lines[-1] if lines else {}
        if "tried" in last and tuple(last["key"]) not in self.done:
            self.add(last["key"], {"status": "failed", "reason": "its process ended"})

    def trying(self, *key: str) -> bool:
        """Notes what comes next; False where it has a row already."""
        if key in self.done:
            return False
        self._write({"stage": self.stage, "key": key, "tried": True})
        return True

    def add(self, key: Sequence[str], row: Row) -> None:
        self.done.add(tuple(key))
        self._write({"stage": self.stage, "key": key, **row})

    def _write(self, line: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")


def read_log(path: Path, tried: bool = False) -> list[Row]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if tried or "tried" not in row]


# ---- tables --------------------------------------------------------------------------------------
SHOWN = (
    ("wall_s", "s", ".3g"), ("cpu_s", "CPU s", ".3g"), ("ratio", "ratio", ".2f"),
    ("ratio_cpu", "CPU ratio", ".2f"), ("ratio_own", "own", ".2f"),
    ("ratio_own_cpu", "CPU own", ".2f"), ("peak_mib", "peak MiB", ".0f"),
    ("beyond_mib", "beyond MiB", ".1f"), ("err_loss", "loss", ".0e"),
    ("err_d_hidden", "dH", ".0e"), ("err_d_weight", "dW", ".0e"),
)  # fmt: skip


def cells_of(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [f"{row['status']}: {row['reason']}", *[""] * (len(SHOWN) - 1)]
    values = (row.get(key) for key, _, _ in SHOWN)
    shown = zip(values, SHOWN, strict=True)
    return ["" if v in ("", None) or v != v else format(float(v), f) for v, (*_, f) in shown]


def text_table(rows: Sequence[Row]) -> str:
    """What a person reads while the benchmark runs."""
    lines = [f"{'variant':<32}" + "".join(f"{name:>11}" for _, name, _ in SHOWN)]
    for row in rows:
        cells = cells_of(row)
        if row["status"] == "ok":
            cells = [f"{c:>10}" for c in cells] + [str(row.get("products_used") or row["reason"])]
        lines.append(f"{row['variant']:<32} " + " ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows: list[dict[str, str]]) -> list[str]:
    """One table a case of linear_logps.csv, fastest first, the limit on top; every column of a
    smaller file."""
    if not rows or "case" not in rows[0] or "wall_s" not in rows[0]:
        columns = [c for c in rows[0] if c not in WHERE] if rows else []
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        return [*lines, *("| " + " | ".join(r[c] for c in columns) + " |" for r in rows), ""]
    cases: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    lines = []
    for name, found in cases.items():
        first = found[0]
        place = first.get("gpu") or f"{first['threads']} thread(s)"
        lines += [
            f"**{name}**: {first['step']}, {first['dtype']}, {place}, {first['head']} head, "
            f"{first['scored']} scored of N={first['N']}, D={first['D']}, V={first['V']}, "
            f"{first['rounds']} rounds, commit {first['commit']}",
            "",
            "| variant | " + " | ".join(name for _, name, _ in SHOWN) + " |",
            "| --- |" + " ---: |" * len(SHOWN),
        ]
        found.sort(key=lambda r: (r["variant"] != LIMIT, float(r["wall_s"] or "inf")))
        lines += ["| " + " | ".join([r["variant"], *cells_of(r)]) + " |" for r in found]
        lines += ["", f"Products: {first['products_used']}.", ""]
    return lines


# ---- where and when ------------------------------------------------------------------------------
@functools.cache
def describe() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": "",
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


@functools.cache
def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """Model with family and number, since cloud machines all call themselves "AMD EPYC"."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text()

    def value(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.M)
        return found.group(1).strip() if found else "?"

    count = len(re.findall(r"^processor\s*:", text, re.M))
    family = f"family {value('cpu family')} model {value('model')}"
    return f"{count}x {value('model name')} ({family})"


def _commit() -> str:
    """Commit of the checkout, "+" when files differ from it; empty outside git."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=10", "HEAD")
    return head + ("+" if head and git("status", "--porcelain") else "")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print("\n".join(markdown(read(Path(argument)))))
