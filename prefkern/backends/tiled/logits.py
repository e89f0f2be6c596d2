"""logits_logps: the same folds and gradients where logits exist already, as one tile of all rows.

Nothing is gathered: kernels skip the rows that do not count, and write 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import SAVED_ROWS
from ..eager.rows import fold_dtype
from . import rows as row_maths
from .epilogue import SECOND_FIELDS, Call, Epilogue, LogitOptions, Tile
from .forward import needs_second
from .heads import make_call, parse
from .topset import TopSet

# Logits copied at a time while bkl's top set is found.
SEEN_ELEMENTS = 1 << 24


def logits_logps_fwd(
    epilogue: Epilogue,
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    ref_logits: Tensor | None,  # [N, V]
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    """(out [n, N], saved [10, N])."""
    (n, vocabulary), acc = logits.shape, fold_dtype(logits.dtype)
    call, tile = _call(logits, targets, ref_logits, temperature, ignore_index, stats)
    if n == 0:
        return logits.new_zeros((len(stats), 0), dtype=acc), logits.new_zeros(
            (SAVED_ROWS, 0), dtype=acc
        )
    chunk = epilogue.chunk_columns(call)
    chunks = -(-vocabulary // chunk)
    fields = torch.empty((len(call.fields), chunks, n), dtype=acc, device=logits.device)
    at_target = torch.zeros((2, n), dtype=acc, device=logits.device)
    epilogue.fold(call, tile, fields, at_target)
    starts = torch.arange(0, vocabulary, chunk, device=logits.device, dtype=torch.float64)
    sums = row_maths.merge(call, fields, starts)
    sums["zy"], sums["ref_zy"] = at_target[0].double(), at_target[1].double()
    sums["target"] = call.targets.double()
    if call.has("bkl"):
        sums["top_value"], sums["top_index"] = top_set(epilogue, call, tile)
    if needs_second(call):
        second = torch.empty((len(SECOND_FIELDS), chunks, n), dtype=acc, device=logits.device)
        epilogue.fold_second(call, tile, row_maths.norms(call, sums), second)
        row_maths.add_second(sums, second)
    out = torch.stack([row_maths.statistic(call, s.name, sums) for s in call.stats]).to(acc)
    kept = row_maths.saved(call, sums, low=True)
    live = call.targets >= 0
    return torch.where(live, out, 0.0), torch.where(live, kept, 0.0)


def logits_logps_bwd(
    epilogue: Epilogue,
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
    call, tile = _call(logits, targets, ref_logits, temperature, ignore_index, stats)
    d_logits = torch.empty_like(logits)
    if logits.shape[0] > 0:
        coefficients = row_maths.coefficients(call, d_out, out, saved, low=True)
        epilogue.gradient(call, tile, coefficients, d_logits)
    return d_logits


def _call(
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> tuple[Call, Tile]:
    options = [LogitOptions(1.0, None, temperature)] * (1 if ref_logits is None else 2)
    y = torch.where(targets == ignore_index, -1, targets)
    call = make_call(parse(stats), options, "", logits.shape[1], logits.dtype, y, given=True)
    return call, Tile(0, 0, logits, ref_logits)


def top_set(epilogue: Epilogue, call: Call, tile: Tile) -> tuple[Tensor, Tensor]:
    assert tile.zr is not None
    n, vocabulary = tile.zr.shape
    top = TopSet(n, min(int(call.param("bkl")), vocabulary), call.fold_dtype, tile.zr.device)
    step = max(1, SEEN_ELEMENTS // vocabulary)
    for r0 in range(0, n, step):
        part = tile.zr[r0 : r0 + step]
        seen = torch.empty(part.shape, dtype=call.fold_dtype, device=part.device)
        epilogue.seen(call, part, 0, seen)
        top.add(seen, slice(r0, r0 + part.shape[0]), 0)
    value, column = top.threshold
    return value.double(), column.double()
