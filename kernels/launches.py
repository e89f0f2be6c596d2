"""Every kernel that may be launched, with its types and constants; the guard that launches them.

To add a kernel
1. Give it a line per arch class in tiles.py (blocks, warps, stages).
2. Add a Launch below. `signature` lists the types of the arguments that are no constexpr, in order:
       *bf16:16   pointer, data and rows aligned to 16 bytes      i32  i64  fp32  fp64  numbers
       i64:16     a number that 16 divides (row strides: 16-byte loads need it)    none  absent
   `constants` are the constexprs that the caller passes; blocks, warps and stages come from tiles.
3. Call `launch("name", grid, *args, FLAG=..., ...)`. `grid` is a tuple, or a function of the dict
   of constants and blocks. Arguments whose types or constants match no row are an error that
   prints the row to add: what was never compiled ahead of time is never launched.

Rows are precious: tests/kernels/test_aot.py compiles each row for each of four architectures, at
0.1 to 1 s each, and all rows together have 300 CPU seconds. So let a flag be a run-time argument
unless it changes the inner loop; serve a rare combination of flags with a row that computes more
than was asked; and mark integers that may be 1 `do_not_specialize`, and sizes that may pass 2^31
`: tl.int64`.

Importing this file imports neither triton nor the kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefkern import env

from . import head_rows, tiles

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]

TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel."""

    name: str  # what `launch` is given; rows of one kernel share it
    kernel: str  # "module:function" below this folder
    signature: str
    tile: str  # "entry dtype" of tiles.TABLE, dtype group included: "fold_one b16"
    constants: dict[str, Any] = field(default_factory=dict)
    wide: bool = False  # reads and writes its tiles 16 bytes at a time; checked ahead of time

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(word.partition(":")[0] for word in self.signature.split())

    def tiles_on(self, arch: str) -> tuple[tiles.Tile, ...]:
        """Candidates, first choice first."""
        return _tiles_of(self.tile, arch)

    def __str__(self) -> str:
        constants = " ".join(f"{k}={v}" for k, v in self.constants.items())
        return f"{self.name}({' '.join(self.types)}{'; ' if constants else ''}{constants})"


@functools.cache
def _tiles_of(entry: str, arch: str) -> tuple[tiles.Tile, ...]:
    name, dtype = entry.split()
    return tiles.candidates(name, dtype, arch)


# fmt: off
ROWS: tuple[Launch, ...] = (
    # list_rank has fp64 kernels alone: fp32 scores are widened before them
    Launch("list_pairs", "list_pairs:list_pairs_kernel",
           "*fp64 *fp64 *i32 *fp64 *fp64 *fp64 i64 i32 i32", "list_rank any"),
    Launch("list_choices", "list_choices:list_choices_kernel",
           "*fp64 *fp64 *i32 *i64 *fp64 *fp64 *fp64 i64 i32", "list_rank any"),
    Launch("list_shares", "list_shares:list_shares_kernel",
           "*fp64 *fp64 *i32 *fp64 *fp64 *fp64 i64 i32", "list_shares any"),
    *(
        row
        for t in ("fp32", "fp64")
        for row in (
            Launch("segment_sum", "segment_sum:sum_kernel",
                   f"*{t} *{t} *i32 *fp64 i64 i64 i64", "segment_sum any"),
            Launch("segment_gradient", "segment_sum:gradient_kernel",
                   f"*fp64 *{t} *{t} *i32 *{t} *{t} i32 i64 i64 i64 i32 i32", "segment_sum any"),
        )
    ),
    *(Launch(*row, wide=row[0] != "raise_rows") for row in head_rows.ROWS),
)
# fmt: on


def by_name(rows: Sequence[Launch]) -> dict[str, tuple[Launch, ...]]:
    found: dict[str, tuple[Launch, ...]] = {}
    for row in rows:
        found[row.name] = (*found.get(row.name, ()), row)
    return found


LAUNCHES: dict[str, tuple[Launch, ...]] = by_name(ROWS)
# `signature` of a launch -> its row: a search takes 6 to 55 us, and is made once.
_FOUND: dict[tuple[Any, ...], Launch] = {}
# Name -> launches in this process, timed ones included; a replayed CUDA graph adds none.
COUNTS: Counter[str] = Counter()


class UnknownLaunch(LookupError):
    """A launch outside LAUNCHES."""


def type_names(argument: Any) -> tuple[str, ...]:
    """Signature types that an argument may be passed as."""
    if isinstance(argument, Tensor):
        return (f"*{TYPE_NAMES[argument.dtype]}",)
    if argument is None:
        return ("none",)
    if isinstance(argument, bool):
        return ("i1",)
    if isinstance(argument, int):
        return ("i32", "i64") if -(2**31) <= argument < 2**31 else ("i64",)
    if isinstance(argument, float):
        return ("fp32", "fp64")
    raise TypeError(f"a kernel takes tensors, numbers and None, got {type(argument).__name__}")


def signature(name: str, args: Sequence[Any], constants: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for launches that `find` cannot tell apart, and for no others."""
    kinds: list[Any] = [name]
    for a in args:
        if isinstance(a, Tensor):
            kinds.append(a.dtype)
        elif isinstance(a, int) and not isinstance(a, bool):
            kinds.append(-(2**31) <= a < 2**31)
        else:
            kinds.append(type(a))
    return (*kinds, *constants.items())


def row_of(name: str, args: Sequence[Any], constants: dict[str, Any]) -> Launch:
    """`find`, once for each signature."""
    key = signature(name, args, constants)
    row = _FOUND.get(key)
    if row is None:
        row = _FOUND[key] = find(name, args, constants)
    return row


def find(name: str, args: Sequence[Any], constants: dict[str, Any]) -> Launch:
    """The row that declares this launch.

    Raises:
        UnknownLaunch: none does; the message holds the row to add.
    """
    rows = LAUNCHES.get(name, ())
    given = [type_names(a) for a in args]
    for row in rows:
        types = row.types
        if (
            len(types) == len(given)
            and all(t in names for t, names in zip(types, given, strict=True))
            and row.constants == constants
        ):
            return row
    kernel = rows[0].kernel if rows else "<module>:<function>"
    entry = rows[0].tile if rows else f"{name} any"
    signature = " ".join(names[0] for names in given)
    have = "".join(f"\n  {row}" for row in rows) or " none"
    raise UnknownLaunch(
        f"kernels/launches.py declares no such launch of {name!r}; declared:{have}\n"
        f"Use one of them, or add to its rows and run tests/kernels/test_aot.py:\n"
        f"  Launch({name!r}, {kernel!r}, {signature!r}, {entry!r}, {constants!r}),"
    )


@functools.cache
def kernel_of(name: str) -> Any:
    """The Triton function `module:function`; the first call imports triton."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"prefkern.kernels.{module}"), function)


def device_of(args: Sequence[Any]) -> torch.device:
    for a in args:
        if isinstance(a, Tensor):
            return a.device
    raise TypeError("a launch needs at least one tensor: its device says where to run")


def launch(
    name: str, grid: Grid, *args: Any, must: dict[str, int] | None = None, **constants: Any
) -> None:
    """Launches a declared kernel with the blocks that tiles.py has for its device; `must` names
    blocks that a workspace was sized by.

    Raises:
        UnknownLaunch: the argument types and constants are in no row.
    """
    row = row_of(name, args, constants)
    tile = choose(row, tiles.arch_of(device_of(args)), args, grid, must)
    run(row, tile, grid, args)


def options(tile: tiles.Tile) -> dict[str, Any]:
    """Triton's compile options. No a * b + c is contracted, so that a logit has the same bits in
    every kernel that forms it; products are fused multiply-adds all the same."""
    return {
        "num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False,
    }  # fmt: skip


def run(row: Launch, tile: tiles.Tile, grid: Grid, args: Sequence[Any]) -> None:
    meta = {**row.constants, **tile.blocks}
    size = grid(meta) if callable(grid) else grid
    if 0 in size:
        return
    device = device_of(args)
    # Triton launches on the current GPU, which need not be the one that holds the tensors
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here:
        kernel_of(row.kernel)[size](*args, **meta, **options(tile))
    COUNTS[row.name] += 1


# What PREFKERN_AUTOTUNE found in this process: (row, arch, shapes) -> tile.
_WINNERS: dict[tuple[str, str, tuple[Any, ...]], tiles.Tile] = {}


def choose(
    row: Launch,
    arch: str,
    args: Sequence[Any],
    grid: Grid | None,
    must: dict[str, int] | None = None,
) -> tiles.Tile:
    """The tile in use: the table's first, or the fastest of them under PREFKERN_AUTOTUNE."""
    found = row.tiles_on(arch)
    if must:
        found = tuple(t for t in found if must.items() <= t.blocks.items())
        if not found:
            raise LookupError(f"kernels/tiles.py has no {row.tile} on {arch} with blocks {must}.")
    if arch == "interpreter" and callable(grid):
        return min(
            found,
            key=lambda t: tiles.interpreted_cost(t, grid({**row.constants, **t.blocks})),
        )
    if len(found) == 1 or arch == "interpreter" or not env.flag("PREFKERN_AUTOTUNE"):
        return found[0]
    key = (str(row), arch, tuple(tuple(a.shape) for a in args if isinstance(a, Tensor)))
    if key not in _WINNERS:
        if grid is None or torch.cuda.is_current_stream_capturing():
            return found[0]  # nothing can be timed here
        _WINNERS[key] = fastest(row, found, grid, args)
    return _WINNERS[key]


def _copy(x: Tensor) -> Tensor:
    """x with the strides that the other arguments name: clone() would drop those of a view."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def fastest(
    row: Launch, found: Sequence[tiles.Tile], grid: Grid, args: Sequence[Any]
) -> tiles.Tile:
    """Times the candidates on copies of the arguments (a kernel may add to its outputs)."""
    from triton.testing import do_bench

    copies = [_copy(a) if isinstance(a, Tensor) else a for a in args]
    times = [do_bench(lambda t=t: run(row, t, grid, copies)) for t in found]
    best = min(range(len(found)), key=times.__getitem__)
    lines = "; ".join(f"{t}: {ms:.4f} ms" for t, ms in zip(found, times, strict=True))
    print(f"prefkern: {row} uses {found[best]} ({lines})", flush=True)
    return found[best]
