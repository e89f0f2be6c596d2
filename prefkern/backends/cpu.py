"""The native CPU backend: loads the compiled op library and hands it the record of a call.

The kernels (csrc/cpu) run on torch's own thread pool and give the same bits for any number of
threads. Shapes: M computed rows or tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import env
from .contract import Folded, Gradients, HeadCall, Problem, Tail
from .native import NativeArithmetic, NativeOps

COMPACTS = FOLDS_WIDE = PICKS_SCHEME = True
LIBRARY = Path(__file__).parents[1].joinpath("_ops_cpu.so")
OPS = ("linear_logps", "linear_divergence", "logits_logps", "list_rank", "segment_sum", "error_sum")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def load_error() -> str | None:
    """Loads the library once; the reason in words when that is not possible."""
    if not LIBRARY.exists():
        return f"the compiled library {LIBRARY.name} is not there ({_build_reason()})"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled library {LIBRARY} does not load: {error}"
    return None


def _build_reason() -> str:
    record = Path(__file__).parents[1].joinpath("_build.json")
    reason = json.loads(record.read_text()).get("reason") if record.exists() else None
    return reason or "build it with: pip install --no-build-isolation ."


@functools.cache
def isa() -> str:
    """Instruction set of the kernels in use: baseline, avx2, avx512 or avx512bf16.

    Raises:
        RuntimeError: the library is missing.
        ValueError: PREFKERN_CPU_ISA names what this machine or build lacks. Automatic choice passes
            it on: it would land on full logits for a misspelt name.
    """
    if error := load_error():
        raise RuntimeError(error)
    try:
        # in a thread of its own, where no tracer of this one (torch.export's) makes a node of it
        with ThreadPoolExecutor(1) as pool:
            return str(pool.submit(torch.ops.prefkern_native.cpu_isa).result())
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None


def unsupported(problem: Problem) -> list[str]:
    """Reasons why these kernels cannot serve `problem`; empty when they can."""
    if env.flag("PREFKERN_NO_EXT"):
        return ["PREFKERN_NO_EXT is set"]
    if error := load_error():
        return [error]
    reasons = []
    if problem.op not in OPS:
        reasons.append(f"it has no {problem.op} (it has {', '.join(OPS)})")
    if problem.device != "cpu":
        reasons.append(f"it runs on cpu tensors, got {problem.device}")
    for dtype in {problem.dtype, problem.weight_dtype} - {None}:
        if dtype not in DTYPES:
            reasons.append(
                f"it computes in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, got "
                f"{dtype}"
            )
    if not reasons:
        isa()
    return reasons


def _ops() -> Any:
    """The library's ops; loaded here too, for a compiled or exported program, which calls an op
    without choosing a backend first."""
    if error := load_error():
        raise RuntimeError(error)
    return torch.ops.prefkern_native


arithmetic = NativeArithmetic(_ops)


def fold(call: HeadCall, kept: int) -> Folded:
    """The first sweep over the vocabulary."""
    sums, at, cache, factors, top, chunks = _ops().fold(*_record(call), kept)
    return Folded(
        sums, at, cache, factors, call.rounds, top if call.plan.has("bkl") else None,
        chunks if call.plan.tail > 0.0 else None,
    )  # fmt: skip


def fold_again(call: HeadCall, norms: Tensor, cache: Tensor) -> Tensor:
    """The second sweep: [SECOND, M] float64."""
    return _ops().fold_again(*_record(call), norms, cache)


def unfold(
    call: HeadCall,
    coefficients: Tensor,
    cache: Tensor,
    needed: frozenset[str],
    tail: Tail | None = None,
) -> Gradients:
    """Coefficients [COEFFICIENTS, M] -> gradients of the fields of `Gradients` named."""
    names = sorted(needed)
    units = (None, None) if tail is None else tail
    found = _ops().unfold(*_record(call), coefficients, cache, ",".join(names), *units)
    return Gradients(**dict(zip(names, found, strict=True)))


def forward(
    tensors: list[Tensor], numbers: list[float], plan: str, ignore_index: int, kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """fold to finish in one op: (out [n, N], saved, cache, normalised factors, chunks)."""
    return _ops().forward(tensors, numbers, plan, ignore_index, kept)


def backward(
    tensors: list[Tensor],
    numbers: list[float],
    plan: str,
    ignore_index: int,
    d_out: Tensor,
    out: Tensor,
    saved: Tensor,
    cache: Tensor,
    factors: Tensor,
    needed: str,
) -> list[Tensor]:
    """pull and unfold in one op: the gradients that `needed` names."""
    record = (tensors, numbers, plan, ignore_index)
    return _ops().backward(*record, d_out, out, saved, cache, factors, needed)


def _record(call: HeadCall) -> tuple[list[Tensor], list[float], str, int]:
    return (*call.pack(), call.plan.text, call.ignore_index)


_OTHER = NativeOps(_ops)
list_rank_fwd = _OTHER.list_rank_fwd
segment_sum_fwd = _OTHER.segment_sum_fwd
segment_sum_bwd = _OTHER.segment_sum_bwd
error_sum_fwd = _OTHER.error_sum_fwd
error_sum_bwd = _OTHER.error_sum_bwd
