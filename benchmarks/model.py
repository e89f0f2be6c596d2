"""The account on paper: what a step must cost on a GPU, from counts, bytes and launches.

Inputs are results/counts.csv, which whoever changes a kernel brings up to date (instructions per
logit from its SASS, bytes, launches), and MACHINES. A kernel takes the longer of its instructions
at ISSUE of the issue slots and its bytes at copy speed. Tiles and the default budget are those of
the machine's memory (prefkern/backends/memory.py: 4 GiB on an H100 of 80 GB, 8 GiB on an H200); a
tile is kept whole or not at all. A step is its products, its kernels and what a schedule adds to
them: wider writes of products whose tiles are fp32, dH in fp32 read and written once a tile, small
kernels, and the start and end of every library product. The ratio is to the bare products at full
rate. A run on a GPU writes what it measured beside it (`beside`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import inside
from .cases import GPU_FIRST, Case
from .results import ROOT, Row, Table, read

TILE_UNITS = ("columns of a chunk", "bytes of a logit in its tiles")
GIB = 1 << 30
RESULTS = ROOT / "benchmarks/results"
ISSUE = 0.8  # of the issue slots that a real kernel uses
HIDDEN = 0.5  # of the fp32 traffic beside products that runs under them
SMALL_SECONDS = 2.5e-6  # a kernel on one number per row
PRODUCT_SECONDS = 12e-6  # ramp and drain of a library product
TILES = ((8192, 16384), (8192, 3072))  # tiles of which kernels are timed alone
LIST_GROUPS = 100_000


class Machine(NamedTuple):
    flops: float  # per second of a large bf16 product
    copy: float  # bytes per second, read and written
    lanes: float  # instructions of single lanes per second: SMs * 128 * clock
    memory: int  # bytes


MACHINES = {
    "H100": Machine(750e12, 3.0e12, 29.6e12, 79 * GIB),
    "H200": Machine(750e12, 4.3e12, 29.6e12, 139 * GIB),
}


class KernelCounts:
    """results/counts.csv of one backend."""

    def __init__(self, backend: str, file: Path = RESULTS / "counts.csv") -> None:
        self.numbers = {
            (row["name"], row["unit"].partition("/")[0]): float(row[backend]) for row in read(file)
        }

    def kernel_seconds(self, name: str, units: float, machine: Machine) -> float:
        """Seconds of a kernel over `units` logits (or lists)."""
        issue = self.numbers[name, "instructions"] / (ISSUE * machine.lanes)
        return units * max(issue, self.numbers[name, "bytes"] / machine.copy)

    def launches(self, name: str) -> float:
        return self.numbers[name, "kernels beside the products"]

    def tile_units(self, name: str) -> tuple[int, int]:
        chunk, size = (int(self.numbers[name, unit]) for unit in TILE_UNITS)
        return chunk, size


def predict(case: Case, backend: str, machine: Machine, budget: int | None) -> dict[str, Row]:
    """Of the "forward" and the "step" (with the backward): time, ratio to its products."""
    counts = KernelCounts(backend)
    n, (v, d) = case.scored, (case.shape.V, case.shape.D)
    logits, one = float(n) * v, case.flops_per_product / machine.flops
    two, wide = case.models == 2, case.step in ("ent", "tdpo")
    name = "frozen" if case.frozen else case.step
    tiles, kept = inside.schedule(case, machine.memory, budget, *counts.tile_units(name))
    sums = 8.0 * n * d * tiles / machine.copy  # fp32 rows of dH, read and written once a tile
    wider = 2.0 * case.models * logits / machine.copy if wide else 0.0

    def kernels(*shares: tuple[str, float]) -> float:
        return sum(counts.kernel_seconds(k, s * logits, machine) for k, s in shares if s)

    fold = "fold_two_small" if two else "fold_one" if wide else "fold_one_small"
    fold = "fold_frozen" if case.frozen else fold
    forward = case.models * (one + tiles * PRODUCT_SECONDS) + kernels((fold, 1.0))
    forward += (1 - HIDDEN) * wider + SMALL_SECONDS * counts.launches(f"{name} forward")
    bare = case.models * one
    if case.frozen:  # the forward forms the rows of dH, the backward scales them
        forward += one + tiles * PRODUCT_SECONDS
        forward += (1 - HIDDEN) * sums
        # a row is moved where its maximum rises: in tile k of a random row with probability 1 / k
        forward += sums / tiles * sum(1 / k for k in range(2, tiles + 1))
        forward += SMALL_SECONDS * tiles * counts.launches("frozen each tile")
        found = {"forward": (forward, bare), "step": (forward, bare + one)}
    else:
        gradient = "gradient_two_small" if two else "gradient_one" if wide else "gradient_one_small"
        again = case.backward_heads * (1 - kept)
        backward = (2 + again) * (one + tiles * PRODUCT_SECONDS) + kernels((gradient, 1.0))
        backward += (1 - HIDDEN) * (sums + (1 - kept) * wider)
        backward += SMALL_SECONDS * counts.launches(f"{name} backward")
        found = {"forward": (forward, bare), "step": (forward + backward, bare + 2 * one)}
    return {
        part: {"ms": 1e3 * seconds, "ratio": seconds / least}
        for part, (seconds, least) in found.items()
    }


def rows() -> Iterator[Row]:
    """results/predicted.csv."""
    for machine, speed in MACHINES.items():
        for backend in ("cuda", "triton"):
            for case in GPU_FIRST:
                for label, budget in (("", None), (", budget 0", 0), (", budget 8 GiB", 8 * GIB)):
                    for part, found in predict(case, backend, speed, budget).items():
                        yield {
                            "machine": machine, "what": part, "case": case.name,
                            "variant": f"prefkern {backend}{label}", **found,
                        }  # fmt: skip
            counts = KernelCounts(backend)
            for m, w in TILES:
                for kernel in inside.KERNELS:
                    yield {
                        "machine": machine, "what": "kernel", "case": f"{kernel.name} {m} x {w}",
                        "variant": f"prefkern {backend}",
                        "ms": 1e3 * counts.kernel_seconds(kernel.name, m * w, speed),
                    }  # fmt: skip
            yield {
                "machine": machine, "what": "list", "case": f"pair {LIST_GROUPS} x 16",
                "variant": f"prefkern {backend}",
                "ms": 1e3 * counts.kernel_seconds("list_pairs", LIST_GROUPS, speed),
            }  # fmt: skip


COLUMNS = ("machine", "what", "case", "variant", "ms", "ratio")


def write(out: Path) -> Path:
    """Writes `out`/predicted.csv; it holds no place and no date, since nothing was measured."""
    table = Table(out / "predicted.csv", COLUMNS, place=False)
    table.add(rows())
    return table.path


def beside(measured: Iterable[Row], gpu: str) -> list[Row]:
    """What a run on a GPU measured ({what, case, variant, ms, ratio}) beside what was predicted."""
    predicted = {
        (row["what"], row["case"], row["variant"]): row for row in rows() if row["machine"] in gpu
    }
    found = []
    for row in measured:
        was = predicted.get((row["what"], row["case"], row["variant"]), {})
        found.append(row | {f"predicted_{k}": was.get(k) for k in ("ms", "ratio")})
    return found
