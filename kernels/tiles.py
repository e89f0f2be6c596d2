"""The only table of block sizes: what one program covers, per kernel, architecture and dtype.

A line of TABLE is

    name        dtype  arch     blocks of the kernel (its constexprs)      warps=W stages=S

name    of the entry; a row of `launches.py` refers to it (several rows may share one)
dtype   b16 (bfloat16, float16), b32 (float32), b64 (float64), any
arch    sm_80, sm_90, sm_100, gfx942, interpreter; `nvidia` stands for the first three, `gpu` for
        the first four
blocks  powers of two; `-` for none. warps and stages are Triton's num_warps and num_stages

Several lines with one name, dtype and arch are candidates: the first is used (of the folds, the
first whose chunk a call allows), PREFKERN_AUTOTUNE=1 times them all. No line has been timed yet:
the sizes are those that compile without a register spill and within shared memory
(tests/kernels/test_aot.py, benchmarks/results/triton_resources.csv).

Importing this file imports neither triton nor the kernels.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

GPU_ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
ARCHS = (*GPU_ARCHS, "interpreter")
# Bytes of shared memory one block may use: CUDA C++ Programming Guide, table "Technical
# Specifications per Compute Capability" (163 KiB on 8.0, 227 KiB on 9.0 and 10.0, opt-in);
# CDNA 3 ISA guide, 64 KiB of LDS per workgroup.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# Registers of one thread at most: 255 on NVIDIA; 512 vector registers of a lane on CDNA 3.
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}

# The interpreter costs about 0.1 ms per operation of a program whatever its block, so it takes
# small blocks where a test's shapes must cross several and large ones where they need not. Of
# several candidates it takes the cheapest by that rule (interpreted_cost).
TABLE = """
list_rank      any    gpu          BLOCK=32                             warps=8 stages=1
list_rank      any    interpreter  BLOCK=16                             warps=1 stages=1
list_shares    any    sm_80        BLOCK=32                             warps=8 stages=1
list_shares    any    sm_90        BLOCK=32                             warps=4 stages=1
list_shares    any    sm_100       BLOCK=32                             warps=4 stages=1
list_shares    any    gfx942       BLOCK=32                             warps=8 stages=1
list_shares    any    interpreter  BLOCK=16                             warps=1 stages=1
segment_sum    any    gpu          BLOCK=1024                           warps=4 stages=1
segment_sum    any    interpreter  BLOCK=32                             warps=1 stages=1
fold_one       b16    gpu          BLOCK_M=1   BLOCK_V=4096             warps=8 stages=1
fold_one       b16    gpu          BLOCK_M=1   BLOCK_V=1024             warps=4 stages=1
fold_one       b32    nvidia       BLOCK_M=1   BLOCK_V=2048             warps=4 stages=1
fold_one       b32    gfx942       BLOCK_M=1   BLOCK_V=4096             warps=8 stages=1
fold_one       b32    gpu          BLOCK_M=1   BLOCK_V=1024             warps=4 stages=1
fold_one       b64    gpu          BLOCK_M=1   BLOCK_V=1024             warps=8 stages=1
fold_one       any    interpreter  BLOCK_M=256 BLOCK_V=64               warps=1 stages=1
fold_one       any    interpreter  BLOCK_M=32  BLOCK_V=128              warps=1 stages=1
fold_one       any    interpreter  BLOCK_M=16  BLOCK_V=512              warps=1 stages=1
fold_one       any    interpreter  BLOCK_M=8   BLOCK_V=4096             warps=1 stages=1
fold_one_small b16    nvidia       BLOCK_M=1   BLOCK_V=4096             warps=4 stages=1
fold_one_small b16    gfx942       BLOCK_M=1   BLOCK_V=4096             warps=8 stages=1
fold_one_small b16    gpu          BLOCK_M=1   BLOCK_V=1024             warps=2 stages=1
fold_one_small b32    nvidia       BLOCK_M=1   BLOCK_V=2048             warps=4 stages=1
fold_one_small b32    gfx942       BLOCK_M=1   BLOCK_V=4096             warps=8 stages=1
fold_one_small b32    gpu          BLOCK_M=1   BLOCK_V=1024             warps=2 stages=1
fold_one_small any    interpreter  BLOCK_M=256 BLOCK_V=64               warps=1 stages=1
fold_one_small any    interpreter  BLOCK_M=32  BLOCK_V=128              warps=1 stages=1
fold_one_small any    interpreter  BLOCK_M=16  BLOCK_V=512              warps=1 stages=1
fold_one_small any    interpreter  BLOCK_M=8   BLOCK_V=4096             warps=1 stages=1
fold_two       b16    gpu          BLOCK_M=1   BLOCK_V=1024             warps=4 stages=1
fold_two       b32    sm_80        BLOCK_M=1   BLOCK_V=1024             warps=8 stages=1
fold_two       b32    sm_90        BLOCK_M=1   BLOCK_V=1024             warps=4 stages=1
fold_two       b32    sm_100       BLOCK_M=1   BLOCK_V=1024             warps=4 stages=1
fold_two       b32    gfx942       BLOCK_M=1   BLOCK_V=1024             warps=4 stages=1
fold_two       b64    gpu          BLOCK_M=1   BLOCK_V=1024             warps=8 stages=1
fold_two       any    interpreter  BLOCK_M=256 BLOCK_V=64               warps=1 stages=1
fold_two       any    interpreter  BLOCK_M=32  BLOCK_V=128              warps=1 stages=1
fold_two       any    interpreter  BLOCK_M=16  BLOCK_V=512              warps=1 stages=1
fold_two       any    interpreter  BLOCK_M=8   BLOCK_V=4096             warps=1 stages=1
fold_two_small b32    nvidia       BLOCK_M=1   BLOCK_V=1024             warps=2 stages=1
fold_two_small b32    gfx942       BLOCK_M=1   BLOCK_V=1024             warps=4 stages=1
fold_two_small any    interpreter  BLOCK_M=256 BLOCK_V=64               warps=1 stages=1
fold_two_small any    interpreter  BLOCK_M=32  BLOCK_V=128              warps=1 stages=1
fold_two_small any    interpreter  BLOCK_M=16  BLOCK_V=512              warps=1 stages=1
fold_two_small any    interpreter  BLOCK_M=8   BLOCK_V=4096             warps=1 stages=1
gradient_one   b16    gpu          BLOCK_M=1   BLOCK_V=4096             warps=8 stages=1
gradient_one   b32    gpu          BLOCK_M=1   BLOCK_V=4096             warps=8 stages=1
gradient_one   b64    gpu          BLOCK_M=1   BLOCK_V=512              warps=4 stages=1
gradient_one   any    interpreter  BLOCK_M=256 BLOCK_V=64               warps=1 stages=1
gradient_one   any    interpreter  BLOCK_M=32  BLOCK_V=128              warps=1 stages=1
gradient_one   any    interpreter  BLOCK_M=16  BLOCK_V=512              warps=1 stages=1
gradient_one   any    interpreter  BLOCK_M=8   BLOCK_V=4096             warps=1 stages=1
gradient_two   b16    nvidia       BLOCK_M=1   BLOCK_V=2048             warps=8 stages=1
gradient_two   b16    gfx942       BLOCK_M=1   BLOCK_V=2048             warps=4 stages=1
gradient_two   b32    nvidia       BLOCK_M=1   BLOCK_V=2048             warps=8 stages=1
gradient_two   b32    gfx942       BLOCK_M=1   BLOCK_V=2048             warps=4 stages=1
gradient_two   b64    gpu          BLOCK_M=1   BLOCK_V=1024             warps=8 stages=1
gradient_two   any    interpreter  BLOCK_M=256 BLOCK_V=64               warps=1 stages=1
gradient_two   any    interpreter  BLOCK_M=32  BLOCK_V=128              warps=1 stages=1
gradient_two   any    interpreter  BLOCK_M=16  BLOCK_V=512              warps=1 stages=1
gradient_two   any    interpreter  BLOCK_M=8   BLOCK_V=4096             warps=1 stages=1
factor         any    gpu          BLOCK_M=1   BLOCK_V=2048             warps=4 stages=1
factor         b64    gpu          BLOCK_M=1   BLOCK_V=512              warps=4 stages=1
factor         any    interpreter  BLOCK_M=256 BLOCK_V=64               warps=1 stages=1
factor         any    interpreter  BLOCK_M=32  BLOCK_V=128              warps=1 stages=1
factor         any    interpreter  BLOCK_M=16  BLOCK_V=512              warps=1 stages=1
factor         any    interpreter  BLOCK_M=8   BLOCK_V=4096             warps=1 stages=1
raise_rows     any    gpu          BLOCK_M=4   BLOCK_D=512              warps=4 stages=1
raise_rows     any    interpreter  BLOCK_M=64  BLOCK_D=64               warps=1 stages=1
"""


class Tile(NamedTuple):
    """Blocks of one program and Triton's two options."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}".strip()


def parse(line: str) -> tuple[str, str, tuple[str, ...], Tile]:
    """(name, dtype group, arch classes, tile) of one line of TABLE."""
    name, dtype, arch, *words = line.split()
    numbers = {k: int(v) for k, _, v in (w.partition("=") for w in words if w != "-")}
    warps, stages = numbers.pop("warps"), numbers.pop("stages")
    archs = {"gpu": GPU_ARCHS, "nvidia": GPU_ARCHS[:3]}.get(arch, (arch,))
    return name, dtype, archs, Tile(numbers, warps, stages)


@functools.cache
def table() -> dict[tuple[str, str, str], tuple[Tile, ...]]:
    """(name, dtype group, arch) -> its candidates, first choice first."""
    rows: dict[tuple[str, str, str], tuple[Tile, ...]] = {}
    for line in TABLE.strip().splitlines():
        name, dtype, archs, tile = parse(line)
        for arch in archs:
            rows[name, dtype, arch] = (*rows.get((name, dtype, arch), ()), tile)
    return rows


def candidates(name: str, dtype: str, arch: str) -> tuple[Tile, ...]:
    """Tiles of an entry for a dtype group on an arch class, first choice first.

    Raises:
        LookupError: the table has no such line.
    """
    rows = table()
    found = rows.get((name, dtype, arch)) or rows.get((name, "any", arch))
    if found is None:
        raise LookupError(
            f"kernels/tiles.py has no line `{name} {dtype} {arch}`; add it to TABLE "
            "(blocks, warps=, stages=)."
        )
    return found


def tile(name: str, dtype: str, arch: str) -> Tile:
    """The tile in use."""
    return candidates(name, dtype, arch)[0]


def interpreted_cost(tile: Tile, grid: tuple[int, ...]) -> int:
    """Lanes that the interpreter works through; a program costs as much as 16,384 of them."""
    return math.prod(grid) * ((1 << 14) + math.prod(tile.blocks.values()))


@functools.cache
def device_class(index: int) -> tuple[str | None, str]:
    """(arch class of a CUDA or ROCm device, its own name); the class is None where the table has
    none. A device of 8.6, 8.9 or 12.x has 99 KiB of shared memory, too little for tiles of 8.0."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = properties.gcnArchName.partition(":")[0]
        return (name if name in GPU_ARCHS else None), name
    name = f"sm_{properties.major}{properties.minor}"
    return {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(
        name
    ), name


def arch_of(device: torch.device) -> str:
    """The arch class whose tiles serve tensors of `device`: a GPU's own, or `interpreter` for CPU
    tensors (Triton's interpreter is the only thing that runs a kernel on those).

    Raises:
        LookupError: the table covers no such GPU.
    """
    if device.type != "cuda":
        return "interpreter"
    arch, name = device_class(torch.cuda.current_device() if device.index is None else device.index)
    if arch is None:
        raise LookupError(
            f"kernels/tiles.py has block sizes for {', '.join(GPU_ARCHS)}, and this GPU is {name}."
        )
    return arch
