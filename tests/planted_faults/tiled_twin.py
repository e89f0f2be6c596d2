"""A tiled linear_logps in plain PyTorch with one switch per planted fault.

With FAULT = None it is right and passes every check of the suite. Each fault is a mistake that a
fused kernel can make and that a loose test would miss. It is a backend module: the functions have
the signatures that prefkern's ops call. Statistics: logp, lse, ent.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAULTS = (
    "bf16_accumulator",
    "missing_rescale",
    "unmasked_nan_row",
    "lse_off_by_one_tile",
    "dw_of_last_ragged_tile",
)
FAULT: str | None = None
TILE_V, TILE_N = 16, 8
STATS = {"logp", "lse", "ent"}


def unsupported(problem) -> list[str]:
    reasons = []
    if problem.op != "linear_logps":
        reasons.append(f"the planted twin offers linear_logps only, not {problem.op}")
    if not {s.partition(":")[0] for s in problem.stats} <= STATS:
        reasons.append(f"the planted twin offers {sorted(STATS)}")
    return reasons


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def scored(targets: Tensor, ignore_index: int) -> Tensor:
    """Rows to compute [M]."""
    if FAULT == "unmasked_nan_row":
        # forgets the compaction and multiplies by the mask at the end: 0 * NaN is NaN
        return torch.arange(targets.numel())
    return (targets != ignore_index).nonzero()[:, 0]


def tiles(size: int, step: int):
    return [(lo, min(lo + step, size)) for lo in range(0, size, step)]


def tile_logits(hidden, weight, bias, lo, hi, scale, softcap, temperature) -> tuple[Tensor, Tensor]:
    """z and dz/dx of one tile [M, hi - lo], unrounded."""
    acc = acc_dtype(hidden.dtype)
    x = hidden.to(acc) @ weight[lo:hi].to(hidden.dtype).to(acc).T
    if bias is not None:
        x = x + bias[lo:hi].to(acc)
    if softcap is None:
        return scale * x / temperature, torch.full_like(x, scale / temperature)
    squash = torch.tanh(scale * x / softcap)
    return softcap * squash / temperature, scale / temperature * (1 - squash**2)


def fold(hidden, weight, bias, targets, options) -> tuple[Tensor, Tensor, Tensor]:
    """Online (lse, sum p z, z_y), each [M], merged over tiles of the vocabulary."""
    rows = torch.arange(targets.numel())
    acc = acc_dtype(hidden.dtype)
    top = torch.full((targets.numel(),), float("-inf"), dtype=acc)
    total, weighted, zy = (torch.zeros(targets.numel(), dtype=acc) for _ in range(3))
    spans = tiles(weight.shape[0], TILE_V)
    for number, (lo, hi) in enumerate(spans):
        z, _ = tile_logits(hidden, weight, bias, lo, hi, *options)
        here = (targets >= lo) & (targets < hi)
        zy = torch.where(here, z[rows, (targets - lo).clamp(0, hi - lo - 1)], zy)
        if FAULT == "lse_off_by_one_tile" and number == len(spans) - 1 and number > 0:
            continue
        peak = torch.maximum(top, z.amax(-1))
        rescale = torch.where(top == peak, 1.0, (top - peak).exp())
        if FAULT == "missing_rescale":
            rescale = torch.ones_like(rescale)
        p = torch.where(z == float("-inf"), 0.0, (z - peak[:, None]).exp())
        total = total * rescale + p.sum(-1)
        weighted = weighted * rescale + torch.where(p > 0, p * z, 0.0).sum(-1)
        top = peak
    return top + total.log(), weighted / total, zy


def linear_logps_fwd(
    hidden,
    weight,
    targets,
    bias,
    scale,
    softcap,
    temperature,
    ignore_index,
    stats,
    cache_rows,
    frozen,
    num_scored,
):
    keep = scored(targets, ignore_index)
    y = targets[keep].clamp(min=0)
    lse, mean, zy = fold(hidden[keep], weight, bias, y, (scale, softcap, temperature))
    found = {"logp": zy - lse, "lse": lse, "ent": lse - mean}
    n, acc = targets.numel(), acc_dtype(hidden.dtype)
    out, saved = torch.zeros(len(stats), n, dtype=acc), torch.zeros(1, n, dtype=acc)
    live = (targets[keep] != ignore_index).to(acc)
    for i, stat in enumerate(stats):
        out[i, keep] = found[stat] * live if FAULT == "unmasked_nan_row" else found[stat]
    saved[0, keep] = lse
    cache = torch.zeros(cache_rows, weight.shape[0], dtype=hidden.dtype)
    rows = torch.zeros(0, dtype=acc)
    if frozen:
        ones = torch.ones(n, dtype=acc)
        rows = torch.zeros(len(stats), n, hidden.shape[1], dtype=acc)
        for i, stat in enumerate(stats):
            d = {s: ones if s == stat else torch.zeros_like(ones) for s in stats}
            rows[i], _, _ = gradients(
                d,
                hidden,
                weight,
                targets,
                bias,
                out,
                saved,
                (scale, softcap, temperature),
                ignore_index,
                stats,
                acc,
            )
    return out, saved, cache, rows


def gradients(
    d_out, hidden, weight, targets, bias, out, saved, options, ignore_index, stats, result
):
    """d_hidden [N, D], d_weight [V, D], d_bias [V] in `result` dtype, tile by tile."""
    keep = scored(targets, ignore_index)
    h, y = hidden[keep], targets[keep].clamp(min=0)
    acc = acc_dtype(hidden.dtype)
    live = (targets[keep] != ignore_index).to(acc)
    # 16-bit sums lose what is below 2^-8 of the running total, at every one of the tiles
    narrow = torch.bfloat16 if FAULT == "bf16_accumulator" else acc
    d_h = torch.zeros(keep.numel(), hidden.shape[1], dtype=narrow)
    d_w = torch.zeros(weight.shape, dtype=narrow)
    d_b = torch.zeros(weight.shape[0], dtype=acc)
    value = dict(zip(stats, out, strict=True))
    n_spans = tiles(keep.numel(), TILE_N)
    for lo, hi in tiles(weight.shape[0], TILE_V):
        z, slope = tile_logits(h, weight, bias, lo, hi, *options)
        lp = z - saved[0, keep][:, None]
        p = lp.exp()
        dz = torch.zeros_like(p)
        columns = torch.arange(lo, hi)
        onehot = (y[:, None] == columns).to(acc)
        for stat in stats:
            c = d_out[stat][keep].to(acc)[:, None]
            if stat == "logp":
                dz += c * (onehot - p)
            elif stat == "lse":
                dz += c * p
            else:
                dz -= c * torch.where(p > 0, p * (lp + value["ent"][keep][:, None]), 0.0)
        dx = dz * slope
        if FAULT == "unmasked_nan_row":
            dx = dx * live[:, None]
        part = weight[lo:hi].to(hidden.dtype).to(acc)
        d_h += (dx @ part).to(narrow)
        for number, (a, b) in enumerate(n_spans):
            last = number == len(n_spans) - 1 and b - a < TILE_N
            if FAULT == "dw_of_last_ragged_tile" and last:
                continue
            d_w[lo:hi] += (dx[a:b].T @ h[a:b].to(acc)).to(narrow)
        d_b[lo:hi] = dx.sum(0)
    whole = torch.zeros(hidden.shape, dtype=result)
    whole[keep] = d_h.to(result)
    return whole, d_w, d_b


def linear_logps_bwd(
    d_out,
    hidden,
    weight,
    targets,
    bias,
    out,
    saved,
    cache,
    rows,
    scale,
    softcap,
    temperature,
    ignore_index,
    stats,
    need_hidden,
    need_weight,
    need_bias,
    num_scored,
):
    if rows.dim() == 3:
        d_hidden = (d_out[:, :, None] * rows).sum(0).to(hidden.dtype)
        return d_hidden, weight.new_zeros(0), hidden.new_zeros(0)
    keep = targets != ignore_index
    d = {s: torch.where(keep, d_out[i], 0.0) for i, s in enumerate(stats)}
    d_hidden, d_weight, d_bias = gradients(
        d,
        hidden,
        weight,
        targets,
        bias,
        out,
        saved,
        (scale, softcap, temperature),
        ignore_index,
        stats,
        hidden.dtype,
    )
    return (
        d_hidden if need_hidden else hidden.new_zeros(0),
        d_weight.to(weight.dtype) if need_weight else weight.new_zeros(0),
        d_bias.to(bias.dtype) if need_bias else hidden.new_zeros(0),
    )
