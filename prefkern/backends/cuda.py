"""The native CUDA backend: the compiled kernels of csrc/cuda behind prefkern.backends.tiled.

Shapes: N tokens, V vocabulary, M scored rows; tiles [m, w]. Matrix products are torch's; the
kernels read tiles of their results once. Importing this module loads no CUDA library: that happens
for the first problem that is on a CUDA device.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import env
from . import tables, tiled
from .contract import Arithmetic, Problem
from .native import NativeArithmetic, NativeOps
from .tiled.epilogue import FrozenSums, ProductTile, Sweep, fold_in_steps

LIBRARY = Path(__file__).parents[1].joinpath("_ops_cuda.so")
RAN_ON = Path(__file__).parents[1].joinpath("cuda_ran_on.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Codes of csrc/dispatch.h.
CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
# op -> the kernels it may launch, by the names of csrc/cuda/*.cu
ROWS = ("merge_rows", "finish_rows", "pull_rows")
_ONE = ("fold_one_small", "fold_one", "gradient_one_small", "gradient_one", *ROWS)
_TWO = (
    "fold_two_small",
    "fold_two",
    "fold_second",
    "norm_rows",
    "gradient_two_small",
    "gradient_two",
)
_FROZEN = ("fold_frozen", "frozen_factors", "raise_rows")
KERNELS: dict[str, tuple[str, ...]] = {
    "linear_logps": (*_ONE, *_FROZEN),
    "linear_divergence": (*_ONE, *_TWO, *_FROZEN),
    "logits_logps": (*_ONE, *_TWO),
    "list_rank": (
        "list_pairs", "list_pairs_f64", "list_stages", "list_stages_f64", "list_softmax",
        "list_softmax_f64",
    ),
    "segment_sum": (
        "segment_sums", "segment_sums_f64", "segment_merge", "segment_slopes", "segment_slopes_f64",
    ),
}  # fmt: skip
# Ops outside the head sum in float64 and take it.
SUM_DTYPES = {
    "list_rank": (torch.float32, torch.float64),
    "segment_sum": (torch.float32, torch.float64),
}


@functools.cache
def load_error(index: int | None = None) -> str | None:
    """Loads the library once; the reason in words when it cannot be, or has no code for the GPU of
    this index (None: the current one)."""
    if reason := missing():
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no GPU (no driver, or one that is too old for this torch)"
    if reason := older(torch.version.cuda, _record().get("cuda_toolkit")):
        return reason
    capability = torch.cuda.get_device_capability(index)
    if reason := unserved(capability, _record().get("cuda_archs", [])):
        return reason
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled library {LIBRARY} does not load: {error}"
    return None


def usable_on(device: torch.device) -> bool:
    """Whether the library serves tensors of a device; no variable switches it off."""
    if device.type != "cuda" or switched_off():
        return False
    return load_error(device.index) is None


def _ops() -> Any:
    """The library's ops; loaded here too, for an exported program, which chooses no backend."""
    if not hasattr(torch.ops.prefkern_cuda, "fold") and (error := load_error()):
        raise RuntimeError(error)
    return torch.ops.prefkern_cuda


def switched_off() -> str | None:
    """The variable that does."""
    return next((n for n in ("PREFKERN_NO_CUDA", "PREFKERN_NO_EXT") if env.flag(n)), None)


def missing() -> str | None:
    """Why there is no library to load, without loading it."""
    if LIBRARY.exists():
        return None
    reason = _record().get("cuda_reason") or "build it with: pip install --no-build-isolation ."
    return f"the compiled library {LIBRARY.name} is not there ({reason})"


def _record() -> dict[str, Any]:
    """What setup.py wrote about the build."""
    record = Path(__file__).parents[1].joinpath("_build.json")
    return json.loads(record.read_text()) if record.exists() else {}


def older(torch_cuda: str, toolkit: str | None) -> str | None:
    """Why a library of CUDA `toolkit` may find no driver that is new enough: a driver of one major
    version serves every toolkit of it, and torch's own version is the one it is known to serve."""
    if toolkit is None or int(torch_cuda.split(".")[0]) >= int(toolkit.split(".")[0]):
        return None
    return (
        f"it was built with CUDA {toolkit} and torch uses CUDA {torch_cuda}, whose driver may be "
        "too old for it; build it with a toolkit of torch's version, or install torch for CUDA "
        f"{toolkit.split('.')[0]}"
    )


def unserved(capability: tuple[int, int], archs: list[str]) -> str | None:
    """Why code for `archs` (sm_80, sm_90a ...) does not run on a GPU. Machine code runs on later
    GPUs of its generation, with an `a` on its own alone; PTX of the newest on what is newer."""
    made = {x: divmod(int(x.strip("sm_af")), 10) for x in archs}
    same = (x for x, (major, _) in made.items() if major == capability[0])
    if any(made[x] == capability or (x[-1] != "a" and made[x] < capability) for x in same):
        return None
    if not made or capability > max(made.values()):
        return None
    return f"it was built for {', '.join(archs)}, and this GPU is sm_{capability[0]}{capability[1]}"


def unsupported(problem: Problem) -> list[str]:
    """Reasons why these kernels cannot serve `problem`; empty when they can."""
    if name := switched_off():
        return [f"{name} is set"]
    if reason := missing():
        return [reason]
    reasons = unfit(problem)
    if problem.device != "cuda":
        reasons.append(f"it runs on cuda tensors, got {problem.device}")
    elif error := load_error(problem.index):
        reasons.append(error)
    return reasons


def unfit(problem: Problem) -> list[str]:
    """Reasons that lie in the problem itself, whatever machine this is."""
    reasons = []
    if problem.op not in KERNELS:
        reasons.append(f"it has no {problem.op} (it has {', '.join(KERNELS)})")
    elif problem.dtype not in (dtypes := SUM_DTYPES.get(problem.op, DTYPES)):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        reasons.append(f"its {problem.op} computes in {names}, got {problem.dtype}")
    return reasons


def held_back(problem: Problem) -> list[str]:
    """Kernels that `problem` may launch and no recorded run on a GPU has seen."""
    never = [name for name in KERNELS.get(problem.op, ()) if ran_on()[name] is None]
    if not never:
        return []
    return [f"no recorded run on a GPU of its kernels {', '.join(never)} ({RAN_ON.name})"]


def seen_kernels() -> dict[str, int]:
    """Kernel -> launches in this process; a replayed CUDA graph adds none. All 0 where the library
    is not loaded."""
    names = ran_on()
    if not hasattr(torch.ops.prefkern_cuda, "launches"):
        return dict.fromkeys(names, 0)
    return {name: _ops().launches(name) for name in names}


@functools.cache
def ran_on() -> dict[str, dict[str, str] | None]:
    """Kernel -> the GPU and commit that a recorded run had, None where there is none."""
    return json.loads(RAN_ON.read_text())


def _biases(sweep: Sweep) -> list[Tensor | None]:
    """Of policy, reference and third head."""
    found = [option.bias for option in sweep.options]
    return [*found, *[None] * (3 - len(found))]


class Kernels:
    """prefkern.backends.tiled.epilogue.Epilogue in CUDA C++; csrc/cuda/tile_ops.h has the ops."""

    # A block reads several chunks and writes the sums of one, so narrow ones cost it nothing. Tiles
    # are multiples of a chunk: of two fp32 products and 16-bit gradients 256 MiB hold 3,276 columns
    # of 8,192 rows, which 4,096 would cut into two blocks of rows.
    CHUNK, CHUNK_OF_TWO = 4096, 1024
    # A frozen head's one kernel has a block per row: fewer would leave a large GPU half empty.
    ROWS = 128
    arithmetic: Arithmetic = NativeArithmetic(_ops)

    def chunk_columns(self, sweep: Sweep) -> int:
        widest = self.CHUNK if len(sweep.options) == 1 else self.CHUNK_OF_TWO
        return min(widest, sweep.widest_chunk)

    def fold(
        self, sweep: Sweep, tile: ProductTile, fields: Tensor, at: Tensor, keep: Tensor | None
    ) -> None:
        x, xr, xa = (*tile.x, None, None)[:3]
        code = CODES[sweep.call.working] if sweep.rounded else CODES[torch.float32]
        _ops().fold(
            x, xr, xa, tile.adv, *_biases(sweep), sweep.targets[tile.rows], fields, at, keep,
            tile.v0, self.chunk_columns(sweep), sweep.call.ignore_index, sweep.small_fold, code,
            sweep.call.plan.text, sweep.numbers,
        )  # fmt: skip

    def fold_again(self, sweep: Sweep, tile: ProductTile, norms: Tensor, fields: Tensor) -> None:
        _ops().fold_again(
            *tile.x, *_biases(sweep)[:2], sweep.targets[tile.rows], norms, fields, tile.v0,
            self.chunk_columns(sweep), sweep.call.ignore_index, sweep.call.plan.text,
            sweep.numbers,
        )  # fmt: skip

    def fold_frozen(
        self,
        sweep: Sweep,
        tile: ProductTile,
        fields: Tensor,
        at: Tensor,
        sums: FrozenSums,
        out: Tensor,
    ) -> None:
        x, xr = tile.x[0], tile.x[1] if len(tile.x) > 1 else None
        plain = sweep.small_fold or (xr is None and x.dtype == torch.float32)
        if not plain or x.shape[0] < self.ROWS:
            fold_in_steps(self, sweep, tile, fields, at, sums, out)
            return
        there = (name in sums.names for name in tables.FACTORS[1:])
        _ops().fold_frozen(
            x, xr, *_biases(sweep)[:2], sweep.targets[tile.rows], fields, at, sums.maxima,
            sums.totals, out, tile.v0, self.chunk_columns(sweep), sweep.call.ignore_index,
            sweep.small_fold, sums.started, *there, sweep.numbers,
        )  # fmt: skip

    def factor(
        self, sweep: Sweep, tile: ProductTile, maxima: Tensor, name: str, out: Tensor
    ) -> None:
        x, xr = (*tile.x, None)[:2]
        _ops().factor(
            x, xr, *_biases(sweep)[:2], sweep.targets[tile.rows], maxima, out, tile.v0,
            sweep.call.ignore_index, tables.FACTORS.index(name), sweep.numbers,
        )  # fmt: skip

    def raise_rows(self, names: tuple[str, ...], totals: Tensor, shift: Tensor) -> None:
        there = (name in names for name in tables.FACTORS[1:])
        _ops().raise_rows(totals, shift, *there)

    def gradient(self, sweep: Sweep, tile: ProductTile, coefficients: Tensor, dx: Tensor) -> None:
        x, xr, xa = (*tile.x, None, None)[:3]
        _ops().gradient(
            x, xr, xa, tile.adv, *_biases(sweep), sweep.targets[tile.rows], coefficients, dx,
            tile.v0, sweep.call.ignore_index, sweep.small_gradient, sweep.rounded,
            sweep.numbers,
        )  # fmt: skip


COMPACTS = FOLDS_WIDE = KEEPS_UNITS = False
KERNEL_SET = Kernels()
arithmetic = KERNEL_SET.arithmetic
fold = functools.partial(tiled.fold, KERNEL_SET)
fold_again = functools.partial(tiled.fold_again, KERNEL_SET)
unfold = functools.partial(tiled.unfold, KERNEL_SET)
_OTHER = NativeOps(_ops)
list_rank_fwd = _OTHER.list_rank_fwd
segment_sum_fwd = _OTHER.segment_sum_fwd
segment_sum_bwd = _OTHER.segment_sum_bwd
