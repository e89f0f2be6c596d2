"""Every launch compiles for every architecture, fits it, and is the code that was meant.

No GPU and no driver: ptxas, cuobjdump and AMD's back end ship in the triton wheel. What is found is
a table; benchmarks/results/triton_resources.csv is the committed copy, whose numbers depend on the
version of ptxas and whose rows must be those of launches.py.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cuda_hot_path import MOST
from prefkern.kernels import launches, tiles

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "benchmarks/results/triton_resources.csv"
# kernels that also write a tile
WRITERS = ("gradient_one", "gradient_two", "factor")


def allowed_stack() -> int:
    """Bytes per thread. Tiles are chosen for the ptxas of Triton 3.9; that of 3.6 spills a register
    or eight of the ranking kernels on sm_90."""
    return 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else 32


def expected(arch: str) -> dict[tuple[str, str], launches.Launch]:
    return {(str(row), str(tile)): row for row in launches.ROWS for tile in row.tiles_on(arch)}


def compiled(what: str, folder: Path):
    """In a process of its own: this one has TRITON_INTERPRET=1, which a kernel never loses."""
    out = folder / f"{what}.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-W", "ignore", str(HERE / "aot.py"), what, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def faults(record: dict, row: launches.Launch, arch: str) -> list[str]:
    """What is wrong with one compiled launch."""
    if "error" in record:
        return [f"does not compile: {record['error']}"]
    found = []
    if record["shared"] > tiles.SHARED_MEMORY[arch]:
        found.append(f"{record['shared']} bytes of shared memory of {tiles.SHARED_MEMORY[arch]}")
    if record["spilled"] or record["stack"] > allowed_stack():
        found.append(f"spills: {record['spilled']} local, {record['stack']} bytes of stack")
    if record["registers"] > tiles.REGISTERS[arch]:
        found.append(f"{record['registers']} registers of {tiles.REGISTERS[arch]}")
    if row.wide and not record["reads16"]:
        found.append("reads its tiles in pieces of less than 16 bytes")
    if row.wide and row.name in WRITERS and not record["writes16"]:
        found.append("writes its tile in pieces of less than 16 bytes")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", tiles.GPU_ARCHS)
def test_every_launch_compiles_and_fits(arch, tmp_path):
    pytest.importorskip("triton")
    rows = expected(arch)
    records = compiled(arch, tmp_path)
    assert {(r["row"], r["tile"]) for r in records} == set(rows)
    wrong = [
        f"{record['row']} with {record['tile']}: {fault}"
        for record in records
        for fault in faults(record, rows[record["row"], record["tile"]], arch)
    ]
    assert not wrong, f"{arch}:\n  " + "\n  ".join(wrong)


@pytest.mark.slow
def test_instructions_per_logit_are_as_counted(tmp_path):
    """The account on paper rests on them, as on those of the CUDA library."""
    pytest.importorskip("triton")
    found = compiled("counts", tmp_path)
    lines = csv.DictReader(TABLE.with_name("counts.csv").read_text().splitlines())
    counted = {x["name"]: float(x["triton"]) for x in lines if x["unit"] == "instructions/logit"}
    assert counted.keys() == found.keys()
    assert {k: n for k, n in found.items() if k in MOST and n > MOST[k][1]} == {}
    if allowed_stack() == 0:  # the table is of one version of the compiler
        bad = {k: (n, counted[k]) for k, n in found.items() if not 0.9 < n / counted[k] <= 1.05}
        assert bad == {}, found


def test_the_committed_table_has_the_rows_of_launches():
    with TABLE.open() as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    found = {(line["row"], line["arch"], line["tile"]) for line in lines}
    wanted = {(row, arch, tile) for arch in tiles.GPU_ARCHS for row, tile in expected(arch)}
    assert found == wanted, (
        f"{TABLE.name} is out of date (missing {len(wanted - found)}, superfluous "
        f"{len(found - wanted)}); run: python tests/kernels/aot.py table"
    )
