"""A tiled head op of one model in plain PyTorch with one switch per planted fault.

With FAULT = None it is right and passes every check of the suite. Each fault is a mistake that a
fused kernel can make and that a loose test would miss. It is a backend module (prefkern.backends.
contract) with the eager arithmetic of rows. Statistics: logp, lse, ent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern.backends import tables
from prefkern.backends.contract import Folded, Gradients, HeadCall
from prefkern.backends.eager import finish as arithmetic

__all__ = ["FAULTS", "arithmetic", "fold", "unfold", "unsupported"]

FAULTS = (
    "bf16_accumulator",
    "missing_rescale",
    "unmasked_nan_row",
    "lse_off_by_one_tile",
    "dw_of_last_ragged_tile",
)
FAULT: str | None = None
COMPACTS = FOLDS_WIDE = False
TILE_V, TILE_N = 16, 8
STATS = {"logp", "lse", "ent"}


def unsupported(problem) -> list[str]:
    reasons = []
    if problem.op != "linear_logps":
        reasons.append(f"the planted twin offers linear_logps only, not {problem.op}")
    if not {s.partition(":")[0] for s in problem.stats} <= STATS:
        reasons.append(f"the planted twin offers {sorted(STATS)}")
    return reasons


def tiles(size: int, step: int):
    return [(lo, min(lo + step, size)) for lo in range(0, size, step)]


def rows_of(call: HeadCall) -> tuple[Tensor, Tensor]:
    """(hidden [M, D], targets [M]) of the computed rows."""
    hidden, y = call.policy.hidden, call.targets
    return (hidden, y) if call.rows is None else (hidden[call.rows], y[call.rows])


def tile_logits(call: HeadCall, hidden: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """z and the variable part of dz/dx of one tile [M, hi - lo], unrounded."""
    policy, acc = call.policy, call.fold_dtype
    x = hidden.to(acc) @ policy.weight[lo:hi].to(hidden.dtype).to(acc).T
    if policy.bias is not None:
        x = x + policy.bias[lo:hi].to(acc)
    if policy.softcap == 0.0:
        return policy.scale * x / policy.temperature, torch.ones_like(x)
    squash = torch.tanh(policy.scale * x / policy.softcap)
    return policy.softcap * squash / policy.temperature, 1 - squash**2


def fold(call: HeadCall, kept: int) -> Folded:
    """Running sums over tiles of the vocabulary."""
    hidden, y = rows_of(call)
    m, acc = hidden.shape[0], call.fold_dtype
    column = torch.arange(m)
    top = torch.full((m,), float("-inf"), dtype=acc)
    total, weighted, zy = (torch.zeros(m, dtype=acc) for _ in range(3))
    spans = tiles(call.V, TILE_V)
    for number, (lo, hi) in enumerate(spans):
        z, _ = tile_logits(call, hidden, lo, hi)
        here = (y >= lo) & (y < hi)
        zy = torch.where(here, z[column, (y - lo).clamp(0, hi - lo - 1)], zy)
        if FAULT == "lse_off_by_one_tile" and number == len(spans) - 1 and number > 0:
            continue
        peak = torch.maximum(top, z.amax(-1))
        rescale = torch.where(top == peak, 1.0, (top - peak).exp())
        shift = torch.where(top == float("-inf"), 0.0, top - peak)
        if FAULT == "missing_rescale":
            rescale = torch.ones_like(rescale)
        x = z - peak[:, None]
        e = torch.where(z == float("-inf"), 0.0, x.exp())
        weighted = rescale * (weighted + shift * total)
        weighted = weighted + torch.where(e > 0, e * x, 0.0).sum(-1)
        total = total * rescale + e.sum(-1)
        top = peak
    sums = torch.zeros(len(tables.FIELDS), m, dtype=torch.float64)
    for name, value in (("max", top), ("sum", total), ("x", weighted)):
        sums[tables.FIELDS.index(name)] = value.double()
    at = torch.zeros(len(tables.AT), m, dtype=torch.float64)
    at[0] = zy.double()
    cache = torch.zeros(1, kept, call.V, dtype=call.cache_dtype)
    factors = torch.zeros(0, dtype=acc)
    if call.plan.frozen:
        factors = frozen_sums(call, hidden, top)
    return Folded(sums, at, cache, factors)


def frozen_sums(call: HeadCall, hidden: Tensor, top: Tensor) -> Tensor:
    """[factors, M, D] relative to the row's maximum."""
    found = {"mass": 0.0, "log": 0.0}
    for lo, hi in tiles(call.V, TILE_V):
        z, slope = tile_logits(call, hidden, lo, hi)
        x = z - top[:, None]
        e = torch.where(z == float("-inf"), 0.0, x.exp()) * slope
        part = call.policy.weight[lo:hi].to(hidden.dtype).to(e.dtype)
        found["mass"] = found["mass"] + e @ part
        found["log"] = found["log"] + torch.where(e != 0, e * x, 0.0) @ part
    return torch.stack([found[name] for name in call.plan.factors])


def unfold(
    call: HeadCall, coefficients: Tensor, cache: Tensor, needed: frozenset[str], tail=None
) -> Gradients:
    """d_hidden, d_weight, d_bias, tile by tile."""
    hidden, y = rows_of(call)
    acc, live = call.fold_dtype, 1.0
    if FAULT == "unmasked_nan_row":
        # takes every row and multiplies by the mask: 0 * NaN is NaN
        hidden, y = call.policy.hidden, call.targets
        live = (y != call.ignore_index).to(acc)[:, None]
        some = coefficients
        coefficients = some.new_zeros(some.shape[0], call.N).index_copy_(1, call.rows, some)
        call = call._replace(rows=None)
    g = dict(zip(tables.COEFFICIENTS, coefficients[:, :, None], strict=True))
    # 16-bit sums lose what is below 2^-8 of the running total, at every one of the tiles
    narrow = torch.bfloat16 if FAULT == "bf16_accumulator" else acc
    d_h = torch.zeros(hidden.shape, dtype=narrow)
    d_w = torch.zeros(call.policy.weight.shape, dtype=narrow)
    d_b = torch.zeros(call.V, dtype=acc)
    spans = tiles(hidden.shape[0], TILE_N)
    for lo, hi in tiles(call.V, TILE_V):
        z, slope = tile_logits(call, hidden, lo, hi)
        lp = (z - g["lse"]) - g["lse_low"]
        p = lp.exp()
        inner = g["a0"] + torch.where(p > 0, g["ent"] * (lp + g["ent_value"]), 0.0)
        onehot = (y[:, None] == torch.arange(lo, hi)).to(acc)
        dx = (p * inner + g["e"] * onehot) * slope * live
        part = call.policy.weight[lo:hi].to(hidden.dtype).to(acc)
        d_h += (dx @ part).to(narrow)
        for number, (a, b) in enumerate(spans):
            last = number == len(spans) - 1 and b - a < TILE_N
            if FAULT == "dw_of_last_ragged_tile" and last:
                continue
            d_w[lo:hi] += (dx[a:b].T @ hidden[a:b].to(acc)).to(narrow)
        d_b[lo:hi] = dx.sum(0)
    whole = torch.zeros(call.N, hidden.shape[1], dtype=call.working)
    whole[slice(None) if call.rows is None else call.rows] = d_h.to(call.working)
    policy = call.policy
    found = {"hidden": whole, "weight": d_w.to(policy.weight.dtype)}
    if policy.bias is not None:
        found["bias"] = d_b.to(policy.bias.dtype)
    return Gradients(**{name: found[name] for name in needed})
