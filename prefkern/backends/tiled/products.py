"""Library products of the head ops. Sums are fp32 (fp64 for fp64) whatever the operands are.

Precision of each product: 16-bit operands are multiplied exactly and summed in fp32; fp32 operands
are multiplied in IEEE fp32, never tf32, which would leave 10 bits of a logit. CPU tensors come here
only under Triton's interpreter and in tests; no CPU product takes 16-bit operands to an fp32
result, so they are widened first, which gives the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ...stats import stat_dtype

# Autograd has one thread per device: the first to enter changes the settings, the last to leave
# puts them back, so that none finds them undone halfway.
_lock = threading.Lock()
_inside = 0
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in here use IEEE fp32 and sum in fp32, whatever the caller has set. The settings are
    the process's; they are put back, and left alone where they are right."""
    global _inside, _undo
    if device.type != "cuda":
        yield
        return
    with _lock:
        if _inside == 0:
            with contextlib.ExitStack() as undo:
                _forbid_tf32(undo)
                _forbid_fp16_sums(undo)
                for name in _REDUCTIONS:
                    _forbid_short_sums(undo, name)
                _undo = undo.pop_all()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _undo.close()


_REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


def _forbid_tf32(undo: contextlib.ExitStack) -> None:
    """torch has an older and a newer setting for this and refuses products while they disagree, so
    the one that was used is the one to change."""
    flags = torch.backends.cuda.matmul
    if flags.fp32_precision != "tf32":
        return
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one alone was set
        undo.callback(setattr, flags, "fp32_precision", "tf32")
        flags.fp32_precision = "ieee"
        return
    undo.callback(torch.set_float32_matmul_precision, older)
    torch.set_float32_matmul_precision("highest")


def _forbid_fp16_sums(undo: contextlib.ExitStack) -> None:
    flags = torch.backends.cuda.matmul
    if flags.allow_fp16_accumulation:
        undo.callback(setattr, flags, "allow_fp16_accumulation", True)
        flags.allow_fp16_accumulation = False


def _forbid_short_sums(undo: contextlib.ExitStack, name: str) -> None:
    flags = torch.backends.cuda.matmul
    if not getattr(flags, name):
        return
    # newer releases hold two numbers here, the second of which is whether sums may be split
    split = getattr(flags, f"{name}_split_k", None)
    undo.callback(setattr, flags, name, True if split is None else (True, split))
    setattr(flags, name, False if split is None else (False, split))


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, summed in fp32 and rounded once to out's dtype. a [m, k], b [k, n], out [m, n]
    with contiguous rows."""
    if a.shape[1] == 0:
        out.zero_()
    elif _as_is(a, out):
        torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and _widens(a, "mm"):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(_wide_product(a, b))


def add_product(a: Tensor, b: Tensor, total: Tensor, *, fresh: bool = False) -> None:
    """total (+)= a @ b, summed in fp32 and rounded once; total [m, n], `fresh` overwrites it."""
    if fresh:
        product(a, b, total)
    elif a.shape[1] == 0:
        pass
    elif _as_is(a, total):
        torch.addmm(total, a, b, out=total)
    elif total.dtype == torch.float32 and _widens(a, "addmm"):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        part = _wide_product(a, b)
        total.copy_(part.add_(total))


def _as_is(a: Tensor, out: Tensor) -> bool:
    """Operands and result have one dtype whose products sum in fp32 (on a CPU, 16-bit ones may
    not)."""
    return a.dtype == out.dtype and (a.is_cuda or a.dtype in (torch.float32, torch.float64))


def _widens(a: Tensor, function: str) -> bool:
    """Whether 16-bit operands may be multiplied to fp32: GPUs alone, and not under every torch."""
    short = a.dtype in (torch.bfloat16, torch.float16)
    return a.is_cuda and short and offers_fp32(function, a.device, a.dtype)


@functools.cache
def offers_fp32(function: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Tries `function` (mm, addmm) with out_dtype once: releases differ in which of the two take
    it, and ROCm in whether."""
    a = torch.zeros((16, 16), dtype=dtype, device=device)
    total = torch.zeros((16, 16), dtype=torch.float32, device=device)
    given = (a, a) if function == "mm" else (total, a, a)
    try:
        getattr(torch, function)(*given, out_dtype=torch.float32, out=total)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        return False
    return True


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    if _widens(a, "mm"):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = stat_dtype(a.dtype)
    return a.to(wide) @ b.to(wide)
