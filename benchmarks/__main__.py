"""`python -m benchmarks`: head cases on a CPU or a GPU, the losses, host overhead, pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import cluster, heads, model, objective, parts, plot, ranks
from .cases import CASES, GROUPS
from .peers import VARIANTS
from .results import ROOT
from .timing import device_of

# beside the cases; see the help of --cases
EXTRAS = {"cpu": ("parts", "objective", "host"), "cuda": ()}
_EVERY = (*EXTRAS["cpu"], "ranks", "predicted", "cluster")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times prefkern and its peers in interleaved rounds, with errors against "
        "float64 and peak memory; writes CSV files and pictures.",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    p.add_argument(
        "--quick", action="store_true", help="1/32 of the work, 3 rounds: about ten minutes"
    )
    names = [*GROUPS, *CASES, *_EVERY]
    p.add_argument(
        "--cases", nargs="+", metavar="NAME", choices=names,
        help=f"cases ({', '.join(CASES)}), groups of them ({', '.join(GROUPS)}), 'parts' (epilogue "
        "alone, share of products), 'objective' (the losses), 'host' (host overhead, "
        "pytest-benchmark), 'ranks' (a head sharded over 1, 2 and 4 processes), 'predicted' and "
        "'cluster' (the accounts on paper, model.py and cluster.py); default: cpu parts objective "
        "host, with --device cuda: gpu",
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


def chosen(given: list[str] | None, device: str) -> list[str]:
    """Groups replaced by their cases, each once, in the order given."""
    given = given or ["gpu" if device == "cuda" else "cpu", *EXTRAS[device]]
    return list(dict.fromkeys(case for name in given for case in GROUPS.get(name, [name])))


def main(argv: list[str] | None = None) -> int:
    """Runs what the arguments say; returns the exit status."""
    args = parser().parse_args(argv)
    size = "quick" if args.quick else "full"
    rounds = (3 if args.quick else 5) if args.repeats is None else args.repeats
    if rounds < 1:
        parser().error(f"--repeats must be at least 1, got {rounds}.")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser().error("--device cuda: no GPU is visible to torch.")
        print(device_of("cuda").describe())
    args.out.mkdir(parents=True, exist_ok=True)
    names, written = chosen(args.cases, args.device), []
    cases = [name for name in names if name in CASES]
    if cases:
        written.append(
            heads.run(
                out=args.out, size=size, device=args.device, cases=cases, variants=args.variants,
                threads=args.threads, rounds=rounds, memory=not args.no_memory,
            )
        )  # fmt: skip
    if "parts" in names:
        written.append(parts.run(args.out, size, rounds))
    if "objective" in names:
        written.append(objective.run(args.out, size, rounds))
    if "host" in names:
        written.append(objective.run_host_overhead(args.out))
    if "predicted" in names:
        written.append(model.write(args.out))
    if "ranks" in names:
        written.append(ranks.run(args.out, rounds))
    if "cluster" in names:
        written.append(cluster.write(args.out))
    for csv_file in written:
        print(f"wrote {csv_file}")
        for picture in plot.draw(csv_file):
            print(f"wrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
