"""Compiles every launch ahead of time, without a driver.

    python tests/kernels/aot.py ARCH OUT.json [PART]   rows whose text contains PART
    python tests/kernels/aot.py table                  every arch, into benchmarks/results
    PYTHONPATH=tests python tests/kernels/aot.py counts OUT.json   instructions per logit, sm_90

Runs in a process of its own without TRITON_INTERPRET (a kernel is fixed as compiled or interpreted
when its module is imported). Writes one record per row and tile: what the compiler says about
registers, spills and shared memory, and what is in the code.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FIELDS = (
    "row", "arch", "tile", "registers", "spilled", "stack", "shared", "reads16", "writes16",
)  # fmt: skip
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TABLE = Path(__file__).resolve().parents[2] / "benchmarks/results/triton_resources.csv"
READ16 = re.compile(
    r"\bld\.global[\w.:]*\.v4\.b32|\bld\.global[\w.:]*\.v(?:8\.b32|[24]\.b64)|"
    r"\bcp\.async\.cg\.shared\.global|\b(?:global|buffer)_load_dwordx4"
)
WRITE16 = re.compile(
    r"\bst\.global[\w.:]*\.v4\.b32|\bst\.global[\w.:]*\.v(?:8\.b32|[24]\.b64)|"
    r"\b(?:global|buffer)_store_dwordx4"
)


def cuobjdump(what: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL ... of the only function in a cubin."""
    text = cuobjdump("--dump-resource-usage", cubin)
    line = next(x for x in text.splitlines() if "REG:" in x)
    return {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", line)}


def amd_usage(assembly: str) -> dict[str, int]:
    names = ("vgpr_count", "agpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    return {name: int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1)) for name in names}


def compiled(row, tile, arch: str):
    """One row with one tile, as Triton's compiler leaves it."""
    import triton
    from prefkern.kernels import launches
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launches.kernel_of(row.kernel)
    constants = {**row.constants, **tile.blocks}
    free = [name for name in kernel.arg_names if name not in constants]
    words = row.signature.split()
    assert len(free) == len(words), f"{row}: {len(words)} types for the arguments {free}"
    given = dict(zip(free, words, strict=True))
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind, _, divisor = given.get(name, "constexpr").partition(":")
        signature[name] = "constexpr" if kind == "none" else kind
        if kind == "none":
            constants[name] = None
        if divisor:
            attributes[place,] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=launches.options(tile))


def build(row, tile, arch: str) -> dict:
    """What is known of one compiled row."""
    made = compiled(row, tile, arch)
    code = made.asm["ptx"] if arch.startswith("sm_") else made.asm["amdgcn"]
    if arch.startswith("sm_"):
        usage = nvidia_usage(made.asm["cubin"])
        used = {"registers": usage["REG"], "spilled": usage["LOCAL"], "stack": usage["STACK"]}
    else:
        usage = amd_usage(code)
        used = {
            "registers": usage["vgpr_count"],
            "spilled": usage["vgpr_spill_count"],
            "stack": usage["private_segment_fixed_size"],
        }
    return {
        "row": str(row), "arch": arch, "tile": str(tile), **used, "shared": made.metadata.shared,
        "reads16": len(READ16.findall(code)), "writes16": len(WRITE16.findall(code)),
    }  # fmt: skip


def compile_all(arch: str, part: str = "") -> list[dict]:
    """One record per row and tile."""
    from prefkern.kernels import launches
    from triton.errors import TritonError

    records = []
    for row in launches.ROWS:
        if part not in str(row):
            continue
        for tile in row.tiles_on(arch):
            before = sum(os.times()[:4])
            try:
                record = build(row, tile, arch)
            except (TritonError, RuntimeError, AssertionError, LookupError, ValueError) as error:
                record = {"row": str(row), "arch": arch, "tile": str(tile), "error": repr(error)}
            records.append({**record, "cpu_seconds": round(sum(os.times()[:4]) - before, 2)})
    return records


# Row of results/counts.csv -> launch, types of its tile and of what it writes or rounds to,
# constants; exponentials of a logit (of both models), tiles that it reads and writes.
COUNTED = {
    "fold_one_small": ("fold_one", "bf16", "bf16", {"FULL": False, "ROUND": False}, (1, 1, 0)),
    "fold_one": ("fold_one", "fp32", "fp32", {"FULL": True, "ROUND": False}, (1, 1, 0)),
    "fold_one keeping": ("fold_one", "fp32", "bf16", {"FULL": True, "ROUND": True}, (2, 1, 1)),
    "fold_two_small": ("fold_two", "fp32", "fp32", {"FULL": False, "ROUND": False}, (2, 2, 0)),
    "fold_two_small keeping": (
        "fold_two", "fp32", "bf16", {"FULL": False, "ROUND": True}, (3, 2, 1),
    ),
    "gradient_one_small": (
        "gradient_one", "bf16", "bf16", {"FULL": False, "ROUND": False}, (1, 1, 1),
    ),
    "gradient_one": ("gradient_one", "fp32", "bf16", {"FULL": True, "ROUND": False}, (1, 1, 1)),
    "gradient_two_small": ("gradient_two", "fp32", "bf16", {"FULL": False}, (2, 2, 1)),
    "frozen_factors": ("factor", "bf16", "bf16", {}, (1, 1, 1)),
}  # fmt: skip
OUTPUT = {"fold_one": 2, "fold_two": 4, "gradient_one": 2, "gradient_two": 4, "factor": 2}


def counted() -> dict[str, float]:
    """Instructions per logit on sm_90, of a program's start and end a thread's share."""
    from cuda_hot_path import Work, instructions_to_the_end, listings
    from prefkern.kernels import launches

    found = {}
    for name, (launch, tile_type, written, constants, work) in COUNTED.items():
        (row,) = (
            r
            for r in launches.LAUNCHES[launch]
            if r.constants == constants
            and (r.types[0], r.types[OUTPUT[launch]]) == (f"*{tile_type}", f"*{written}")
        )
        tile = row.tiles_on("sm_90")[0]
        logits = tile.blocks["BLOCK_M"] * tile.blocks["BLOCK_V"] // (32 * tile.num_warps)
        packets = logits // (8 if tile_type == "bf16" else 4), logits // 8  # read, written
        everything = Work(work[0] * logits, work[1] * packets[0], work[2] * packets[1])
        (code,) = listings(cuobjdump("-sass", compiled(row, tile, "sm_90").asm["cubin"])).values()
        found[name] = instructions_to_the_end(code, everything) / logits
    return found | {"fold_frozen": found["fold_one_small"] + found["frozen_factors"]}


def write_table(records: list[dict], path: Path) -> None:
    import triton

    with path.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}, without a device\n")
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def main(what: str, out: str = "", part: str = "") -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    if what == "table":
        write_table([r for arch in TARGETS for r in compile_all(arch)], TABLE)
    else:
        made = counted() if what == "counts" else compile_all(what, part)
        Path(out).write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
