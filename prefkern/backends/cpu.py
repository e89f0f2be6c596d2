"""The native CPU backend: loads the compiled op library and adapts it to the backend functions.

Shapes: N tokens, V vocabulary, D hidden size, n statistics. The kernels run on torch's own thread
pool and give the same bits for any number of threads. Products, folds and gradients are C++
(csrc/cpu); nothing here touches a logit.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from .. import env
from .contract import Problem

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


def isa() -> str:
    """Instruction set of the kernels in use: baseline, avx2, avx512 or avx512bf16.

    Raises:
        RuntimeError: the library is missing, or PREFKERN_CPU_ISA names what this machine lacks.
    """
    if error := load_error():
        raise RuntimeError(error)
    return torch.ops.prefkern_native.cpu_isa()


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
    try:
        isa()
    except RuntimeError as error:  # PREFKERN_CPU_ISA asks for what is not there
        reasons.append(str(error).splitlines()[0])
    return reasons


def linear_logps_fwd(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    cache_rows: int,
    frozen: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved [1, N], cache [cache_rows, V], rows [n', N, D] or [0])."""
    # num_scored is for devices where counting costs a synchronisation; here the rows are counted.
    return torch.ops.prefkern_native.linear_logps_fwd(
        hidden, weight, targets, bias, scale, softcap, temperature, ignore_index, ",".join(stats),
        cache_rows, frozen,
    )  # fmt: skip


def linear_logps_bwd(
    d_out: Tensor,  # [n, N]
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    out: Tensor,
    saved: Tensor,
    cache: Tensor,
    rows: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden [N, D], d_weight [V, D], d_bias [V]); [0] where not needed."""
    return torch.ops.prefkern_native.linear_logps_bwd(
        d_out, hidden, weight, targets, bias, out, saved, cache, rows, scale, softcap, temperature,
        ignore_index, ",".join(stats), need_hidden, need_weight, need_bias,
    )  # fmt: skip


def linear_divergence_fwd(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    ref_hidden: Tensor,  # [N, Dr]
    ref_weight: Tensor,  # [V, Dr]
    bias: Tensor | None,  # [V]
    ref_bias: Tensor | None,  # [V]
    aux_hidden: Tensor | None,  # [N, Da]
    aux_weight: Tensor | None,  # [V, Da]
    values: Tensor | None,  # [V], or [N, k] with values_index
    values_index: Tensor | None,  # [N, k]
    scale: float,
    ref_scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    temperature: float,
    ref_temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    cache_rows: int,
    frozen: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved [10, N], cache [2, cache_rows, V], rows [n', N, D] or [0])."""
    return torch.ops.prefkern_native.linear_divergence_fwd(
        hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias, aux_hidden,
        aux_weight, values,
        values_index, scale, ref_scale, softcap, ref_softcap, temperature, ref_temperature,
        ignore_index,
        ",".join(stats), cache_rows, frozen,
    )  # fmt: skip


def linear_divergence_bwd(
    d_out: Tensor,  # [n, N]
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    aux_hidden: Tensor | None,
    aux_weight: Tensor | None,
    values: Tensor | None,
    values_index: Tensor | None,
    out: Tensor,
    saved: Tensor,
    cache: Tensor,
    rows: Tensor,
    scale: float,
    ref_scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    temperature: float,
    ref_temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias) of the policy; [0] where not needed."""
    return torch.ops.prefkern_native.linear_divergence_bwd(
        d_out, hidden, weight, targets, ref_hidden, ref_weight, bias, ref_bias, aux_hidden,
        aux_weight,
        values, values_index, out, saved, cache, rows, scale, ref_scale, softcap, ref_softcap,
        temperature, ref_temperature, ignore_index, ",".join(stats), need_hidden, need_weight,
        need_bias,
    )  # fmt: skip


def logits_logps_fwd(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    ref_logits: Tensor | None,  # [N, V]
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    """(out [n, N], saved [10, N])."""
    return torch.ops.prefkern_native.logits_logps_fwd(
        logits, targets, ref_logits, temperature, ignore_index, ",".join(stats)
    )


def logits_logps_bwd(
    d_out: Tensor,  # [n, N]
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    out: Tensor,
    saved: Tensor,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> Tensor:
    """d_logits [N, V] in the logits' dtype."""
    return torch.ops.prefkern_native.logits_logps_bwd(
        d_out, logits, targets, ref_logits, out, saved, temperature, ignore_index, ",".join(stats)
    )


def list_rank_fwd(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S], NaN where masked
    cu_groups: Tensor,  # [G+1] int32
    topk: Tensor | None,  # [G] int64
    family: str,
    options: str,
) -> tuple[Tensor, Tensor]:
    """(loss [G], u [S])."""
    return torch.ops.prefkern_native.list_rank_fwd(scores, labels, cu_groups, topk, family, options)


def segment_sum_fwd(
    values: Tensor,  # [m, N]
    weights: Tensor | None,  # [N] or [m, N]
    cu_seqlens: Tensor,  # [S+1] int32
) -> Tensor:
    """[m, S] float64."""
    return torch.ops.prefkern_native.segment_sum_fwd(values, weights, cu_seqlens)


def segment_sum_bwd(
    d_out: Tensor,  # [m, S]
    values: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor,
    need_values: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """(d_values [m, N], d_weights like weights); [0] where not needed."""
    return torch.ops.prefkern_native.segment_sum_bwd(
        d_out, values, weights, cu_seqlens, need_values, need_weights
    )


def error_sum_fwd(
    pred: Tensor,  # [B, O, F, I]
    target: Tensor,
    ref: Tensor | None,
    segments: Tensor | None,  # [F] int32
    num_segments: int,
    stats: str,
) -> Tensor:
    """[n, B, num_segments] float64."""
    return torch.ops.prefkern_native.error_sum_fwd(pred, target, ref, segments, num_segments, stats)


def error_sum_bwd(
    d_out: Tensor,  # [n, B, num_segments]
    pred: Tensor,
    target: Tensor,
    ref: Tensor | None,
    segments: Tensor | None,
    stats: str,
) -> Tensor:
    """d_pred like pred."""
    return torch.ops.prefkern_native.error_sum_bwd(d_out, pred, target, ref, segments, stats)
