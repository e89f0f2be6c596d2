"""segment_sum: fp64 sums over the pieces of a packed axis, and their gradients.

Shapes: m statistics, N tokens, S segments. A program owns one segment (of one statistic) or, in
long batches, every SPLITS-th block of it; the parts are then added in a fixed order. Nothing is
added atomically: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch

# From this mean length on, a segment is shared by several programs; a single program reads about
# 1024 numbers per turn.
LONG = 1 << 15
MOST_SPLITS = 32


@triton.jit(do_not_specialize=["n", "row_step", "token_step"])
def sum_kernel(
    values,  # [m, N]
    weights,  # [1], [N] or [m, N]
    cu_seqlens,  # [S+1] int32
    out,  # [splits, m, S] fp64
    n: tl.int64,  # N
    row_step: tl.int64,  # from a row of weights to the next: N, or 0 for one row
    token_step: tl.int64,  # from a token's weight to the next: 1, or 0 for no weights
    BLOCK: tl.constexpr,
):
    segment, row, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    segments, rows, parts = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    start = tl.load(cu_seqlens + segment)
    end = tl.load(cu_seqlens + segment + 1)
    values += row * n
    weights += row * row_step
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(start + part * BLOCK, end, parts * BLOCK):
        i = (first + tl.arange(0, BLOCK)).to(tl.int64)
        inside = i < end
        v = tl.load(values + i, mask=inside, other=0.0).to(tl.float64)
        w = tl.load(weights + i * token_step, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(w == 0.0, 0.0, w * v)  # a weight of 0 hides any value
    place = (part.to(tl.int64) * rows + row) * segments + segment
    tl.store(out + place, tl.sum(total, 0))


@triton.jit(do_not_specialize=["m", "n", "row_step", "token_step", "need_values", "need_weights"])
def gradient_kernel(
    d_out,  # [m, S] fp64
    values,  # [m, N]
    weights,  # [1], [N] or [m, N]
    cu_seqlens,  # [S+1] int32
    d_values,  # [m, N] like values, if need_values
    d_weights,  # like weights, if need_weights
    m,
    n: tl.int64,
    row_step: tl.int64,
    token_step: tl.int64,
    need_values,
    need_weights,
    BLOCK: tl.constexpr,
):
    segment, part = tl.program_id(0), tl.program_id(1)
    segments, parts = tl.num_programs(0), tl.num_programs(1)
    start = tl.load(cu_seqlens + segment)
    end = tl.load(cu_seqlens + segment + 1)
    for first in range(start + part * BLOCK, end, parts * BLOCK):
        i = (first + tl.arange(0, BLOCK)).to(tl.int64)
        inside = i < end
        shared = tl.zeros((BLOCK,), tl.float64)  # gradient of a weight that serves every row
        for row in range(0, m):
            d = tl.load(d_out + row * segments.to(tl.int64) + segment)
            if need_values != 0:
                at = row * row_step + i * token_step
                w = tl.load(weights + at, mask=inside, other=0.0).to(tl.float64)
                tl.store(d_values + row * n + i, (d * w).to(values.dtype.element_ty), mask=inside)
            if need_weights != 0:
                v = tl.load(values + row * n + i, mask=inside, other=0.0).to(tl.float64)
                grad = tl.where(d == 0.0, 0.0, d * v)
                if row_step != 0:
                    each = grad.to(weights.dtype.element_ty)
                    tl.store(d_weights + row * n + i, each, mask=inside)
                else:
                    shared += grad
        if (need_weights != 0) & (row_step == 0):
            tl.store(d_weights + i, shared.to(weights.dtype.element_ty), mask=inside)
    # Tokens before the first boundary and behind the last belong to no segment: 0, shared by all.
    before = tl.load(cu_seqlens).to(tl.int64)
    after = tl.load(cu_seqlens + segments).to(tl.int64)
    nothing = tl.zeros((BLOCK,), tl.float64).to(values.dtype.element_ty)
    outside = before + n - after
    program = (part.to(tl.int64) * segments + segment) * BLOCK
    for first in range(program, outside, parts.to(tl.int64) * segments * BLOCK):
        k = first + tl.arange(0, BLOCK)
        i = tl.where(k < before, k, k - before + after)
        if (need_weights != 0) & (row_step == 0):
            tl.store(d_weights + i, nothing, mask=k < outside)
        for row in range(0, m):
            if need_values != 0:
                tl.store(d_values + row * n + i, nothing, mask=k < outside)
            if (need_weights != 0) & (row_step != 0):
                tl.store(d_weights + row * n + i, nothing, mask=k < outside)


def segment_sum_fwd(
    values: Tensor,  # [m, N]
    weights: Tensor | None,  # [N] or [m, N]
    cu_seqlens: Tensor,  # [S+1] int32
) -> Tensor:
    """[m, S] fp64."""
    (rows, n), segments = values.shape, cu_seqlens.shape[0] - 1
    values, weights, row_step, token_step = _same_type(values, weights)
    parts = _splits(n, segments)
    out = values.new_empty((parts, rows, segments), dtype=torch.float64)
    launch(
        "segment_sum", (segments, rows, parts), values, weights, cu_seqlens, out, n, row_step,
        token_step,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def segment_sum_bwd(
    d_out: Tensor,  # [m, S]
    values: Tensor,  # [m, N]
    weights: Tensor | None,
    cu_seqlens: Tensor,
    need_values: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """(d_values [m, N], d_weights like weights); [0] where not needed."""
    (rows, n), segments = values.shape, cu_seqlens.shape[0] - 1
    v, w, row_step, token_step = _same_type(values, weights)
    # Without a segment no program runs, and no token has a gradient.
    like = torch.empty_like if segments else torch.zeros_like
    d_values = like(v) if need_values else v.new_empty(0)
    d_weights = like(w) if need_weights else w.new_empty(0)
    launch(
        "segment_gradient", (segments, _splits(n, segments)), d_out, v, w, cu_seqlens, d_values,
        d_weights, rows, n, row_step, token_step, int(need_values), int(need_weights),
    )  # fmt: skip
    return d_values.to(values.dtype), d_weights.to((values if weights is None else weights).dtype)


def _same_type(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, int, int]:
    """Both in one dtype (the wider, exact), and the steps of weights along rows and tokens."""
    if weights is None:
        return values, values.new_ones(1), 0, 0
    dtype = torch.promote_types(values.dtype, weights.dtype)
    step = values.shape[1] if weights.dim() == 2 else 0
    return values.to(dtype), weights.to(dtype), step, 1


def _splits(n: int, segments: int) -> int:
    """Programs that share a segment: by the mean length, which is all that the host knows."""
    return min(MOST_SPLITS, max(1, n // max(segments, 1) // LONG))
