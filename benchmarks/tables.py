"""Markdown tables of the CSV files: `python -m benchmarks.tables results/linear_logps.csv ...`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

HEAD = (
    "variant",
    "s",
    "CPU s",
    "ratio",
    "CPU ratio",
    "own",
    "CPU own",
    "peak MiB",
    "beyond MiB",
    "loss",
    "dH",
    "dW",
)
KEYS = (
    ("wall_s", ".3g"),
    ("cpu_s", ".3g"),
    ("ratio", ".2f"),
    ("ratio_cpu", ".2f"),
    ("ratio_own", ".2f"),
    ("ratio_own_cpu", ".2f"),
    ("peak_mib", ".0f"),
    ("beyond_mib", ".1f"),
    ("err_loss", ".0e"),
    ("err_d_hidden", ".0e"),
    ("err_d_weight", ".0e"),
)


def head_tables(rows: list[dict[str, str]]) -> list[str]:
    """One table a case of linear_logps.csv, fastest first, the limit on top."""
    cases: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    lines = []
    for name, found in cases.items():
        first = found[0]
        lines += [
            f"**{name}**: {first['step']}, {first['dtype']}, {first['threads']} thread(s), "
            f"{first['head']} head, {first['scored']} scored of N={first['N']}, D={first['D']}, "
            f"V={first['V']}, {first['rounds']} rounds",
            "",
            "| " + " | ".join(HEAD) + " |",
            "| --- |" + " ---: |" * (len(HEAD) - 1),
        ]
        found.sort(
            key=lambda r: (not r["variant"].startswith("limit"), float(r["wall_s"] or "inf"))
        )
        for row in found:
            cells = [format(float(row[k]), f) if row[k] else "" for k, f in KEYS]
            if row["status"] != "ok":
                cells = [f"{row['status']}: {row['reason']}", *[""] * (len(KEYS) - 1)]
            lines.append("| " + " | ".join([row["variant"], *cells]) + " |")
        lines += ["", f"Products: {first['products_used']}.", ""]
    return lines


def plain_table(rows: list[dict[str, str]]) -> list[str]:
    """Every column of a small file except where and when it was measured."""
    columns = [c for c in rows[0] if c not in ("torch", "python", "cpu", "isa", "commit", "date")]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*lines, *("| " + " | ".join(row[c] for c in columns) + " |" for row in rows), ""]


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        make = head_tables if path.stem == "linear_logps" else plain_table
        print("\n".join(make(rows)))


if __name__ == "__main__":
    main()
