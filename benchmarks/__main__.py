"""`python -m benchmarks`: the head benchmark, the losses, host overhead, tables and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import bench_linear_logps, bench_objective, parts, plot
from .cases import CASES
from .machine import ROOT
from .peers import VARIANTS

GROUPS = ("parts", "objective", "host")  # beside the cases; see the help of --cases


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times prefkern and its peers in interleaved rounds, with errors against "
        "float64 and peak memory; writes CSV files and pictures.",
    )
    p.add_argument(
        "--quick", action="store_true", help="1/32 of the work, 3 rounds: about five minutes"
    )
    p.add_argument(
        "--cases", nargs="+", metavar="NAME", default=[*CASES, *GROUPS], choices=[*CASES, *GROUPS],
        help=f"cases ({', '.join(CASES)}), 'parts' (epilogue alone, share of products), "
        "'objective' (the losses) and 'host' (host overhead, pytest-benchmark); default: all",
    )  # fmt: skip
    p.add_argument(
        "--variants", nargs="+", metavar="NAME", default=list(VARIANTS), choices=list(VARIANTS),
        help=f"implementations, of: {'; '.join(VARIANTS)}; default: all",
    )  # fmt: skip
    p.add_argument(
        "--threads", type=int, nargs="+", metavar="N", help="keep the cases with N threads"
    )
    p.add_argument("--repeats", type=int, help="rounds; default 5, with --quick 3")
    p.add_argument("--no-memory", action="store_true", help="leave out the memory columns")
    p.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results",
        help="folder of the results; default: results/",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs what the arguments say; returns the exit status."""
    args = parser().parse_args(argv)
    size = "quick" if args.quick else "full"
    rounds = args.repeats or (3 if args.quick else 5)
    if rounds < 1:
        parser().error(f"--repeats must be at least 1, got {rounds}.")
    args.out.mkdir(parents=True, exist_ok=True)
    written = []
    cases = [name for name in args.cases if name in CASES]
    if cases:
        written.append(
            bench_linear_logps.run(
                out=args.out, size=size, cases=cases, variants=args.variants, threads=args.threads,
                rounds=rounds, memory=not args.no_memory,
            )
        )  # fmt: skip
    if "parts" in args.cases:
        written.append(parts.run(args.out, size, rounds))
    if "objective" in args.cases:
        written.append(bench_objective.run(args.out, size, rounds))
    if "host" in args.cases:
        written.append(bench_objective.run_host_overhead(args.out))
    for csv_file in written:
        print(f"wrote {csv_file}")
        for picture in plot.draw(csv_file):
            print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
