"""The forward of the head ops through fused_kernels.py, for calls that keep no logit.

Same functions and results as the forward of prefkern.backends.tiled; a backward recomputes.
`tiles.scheme` decides which of the two runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefkern.backends.contract import SAVED_ROWS
from prefkern.backends.tiled import rows as row_maths
from prefkern.backends.tiled.epilogue import LogitOptions
from prefkern.backends.tiled.heads import Head, Operands, gather, parse

from . import tiles
from .launches import launch, tile_of

# What the kernels fold: everything of one model, and the statistics of two models that need one
# sweep and no third operand.
ONE = frozenset({"logp", "lse", "zy", "ent", "col", "top1", "zmean"})
TWO = frozenset({"logp", "lse", "zy", "ref_logp", "ref_lse", "fkl", "rkl"})
# Programs to aim for: 15 waves of 132 multiprocessors, so that the last, partly filled wave costs
# less than a fifteenth. From shapes alone, so that a device changes no bit of a result.
PROGRAMS = 2048
NOTHING, SEEN, ALL = 0, 1, 2  # what is rounded: fused_kernels._fold_one


def refusal(heads: list[Head], stats: tuple[str, ...], cache_rows: int, frozen: bool) -> list[str]:
    """Reasons why the fused kernels cannot serve a forward; empty when they can."""
    reasons = []
    names, hidden = {s.name for s in parse(stats)}, heads[0].hidden
    if len(heads) > 2:
        reasons.append("they fold no third head")
    if wrong := names - (ONE if len(heads) == 1 else TWO):
        reasons.append(f"they have no {', '.join(sorted(wrong))}")
    dtypes = (torch.float32, torch.bfloat16) + ((torch.float16,) if len(heads) == 1 else ())
    if hidden.dtype not in dtypes:
        reasons.append(f"they compute in {', '.join(map(str, dtypes))}, got {hidden.dtype}")
    for head in heads:
        if head.weight.dtype != hidden.dtype or head.hidden.dtype != hidden.dtype:
            reasons.append(f"every operand must be {hidden.dtype}, got {head.weight.dtype}")
        if head.weight.stride(1) != 1:
            reasons.append("rows of a head must be contiguous")
    if cache_rows or frozen:
        reasons.append("they keep nothing for a backward (memory_budget=0 asks for nothing kept)")
    return reasons


def share_of(m: int, v: int, block_m: int, block_v: int) -> int:
    """Columns that one program walks over, a multiple of block_v."""
    row_blocks, blocks = -(-m // block_m), -(-v // block_v)
    shares = min(blocks, max(1, -(-PROGRAMS // row_blocks)))
    return -(-blocks // shares) * block_v


def forward(
    heads: list[Head],
    targets: Tensor,  # [N]
    ignore_index: int,
    num_scored: int | None,
    stats: tuple[str, ...],
    cache_rows: int,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved [1 | 10, N], cache [0, V] or [2, 0, V], rows [0]).

    Raises:
        ValueError: the fused kernels cannot serve it.
    """
    if reasons := refusal(heads, stats, cache_rows, frozen):
        raise ValueError(f"the fused kernels cannot serve this call: {'; '.join(reasons)}.")
    n, hidden = targets.shape[0], heads[0].hidden
    one = len(heads) == 1
    ops = gather(heads, targets, ignore_index, num_scored, stats, None, None)
    v, device = ops.call.V, hidden.device
    cache = hidden.new_empty((0, v) if one else (2, 0, v))
    if ops.M == 0:
        out = torch.zeros((len(stats), n), dtype=torch.float32, device=device)
        return out, out.new_zeros((1 if one else SAVED_ROWS, n)), cache, out.new_empty(0)
    fields, at_target, starts = run(ops)
    sums = row_maths.merge(ops.call, fields, starts)
    sums["zy"], sums["ref_zy"] = at_target[0].double(), at_target[1].double()
    sums["target"] = ops.call.targets.double()
    out = torch.stack([row_maths.statistic(ops.call, s.name, sums) for s in ops.call.stats])
    saved = row_maths.saved(ops.call, sums)
    return ops.put(out.float(), n), ops.put(saved, n), cache, out.new_empty(0, dtype=torch.float32)


def run(ops: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """(fields [F, shares, M], at_target [2, M], first column of every share)."""
    call, m = ops.call, ops.M
    device = call.params.device
    hidden = [h if h.stride(1) == 1 else h.contiguous() for h in ops.hidden]
    h, w = hidden[0], ops.weights[0]
    at_target = torch.zeros((2, m), dtype=torch.float32, device=device)
    constants: dict[str, Any]
    if call.ref is None:
        name, constants = "fused_one", {"FULL": not call.small}
    else:
        name = "fused_two"
        shared = h.dtype == torch.bfloat16 and _same(w, ops.weights[1])
        constants = {"SHARED": shared}

    def arguments(share: int, fields: Tensor) -> tuple[Tensor | int, ...]:
        bias, size = _bias(call.policy, call.params)
        tail = (share, fields.stride(0), fields.stride(1))
        if call.ref is None:
            rounds = ALL if not call.wide else SEEN if call.rounds else NOTHING
            return (
                h, w, bias, call.targets, call.params, fields, at_target, m, call.V, h.shape[1],
                size, h.stride(0), w.stride(0), *tail, rounds,
            )  # fmt: skip
        g, u = hidden[1], ops.weights[1]
        ref_bias, ref_size = _bias(call.ref, call.params)
        return (
            h, w, bias, g, u, ref_bias, call.targets, call.params, fields, at_target, m, call.V,
            h.shape[1], g.shape[1], size, ref_size, h.stride(0), w.stride(0), g.stride(0),
            u.stride(0), *tail, at_target.stride(0), SEEN if call.wide and call.rounds else NOTHING,
        )  # fmt: skip

    empty = torch.empty((len(call.fields), 1, m), dtype=torch.float32, device=device)
    blocks = tile_of(name, arguments(0, empty), constants).blocks
    share = share_of(m, call.V, blocks["BLOCK_M"], blocks["BLOCK_V"])
    shares = -(-call.V // share)
    fields = torch.empty((len(call.fields), shares, m), dtype=torch.float32, device=device)
    programs = -(-m // blocks["BLOCK_M"]) * shares
    must = {k: blocks[k] for k in ("BLOCK_M", "BLOCK_V")}
    launch(name, (programs,), *arguments(share, fields), must=must, **constants)
    starts = torch.arange(0, call.V, share, device=device, dtype=torch.float64)
    return fields, at_target, starts


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _bias(options: LogitOptions, lent: Tensor) -> tuple[Tensor, int]:
    """The bias and how many entries it has; a tensor that is not read where there is none."""
    return (lent, 0) if options.bias is None else (options.bias, options.bias.shape[0])


def wanted(
    op: str, heads: list[Head], stats: tuple[str, ...], cache_rows: int, frozen: bool
) -> bool:
    """Whether `tiles.scheme` sends a forward here. Where it was asked for by name, a call that
    cannot be served comes here too, to be refused with the reasons."""
    found = tiles.scheme(op, heads[0].hidden)
    if found == "faster":
        return not refusal(heads, stats, cache_rows, frozen)
    return found == "fused"


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
    """As in prefkern.backends.eager; see `forward`."""
    head = Head(hidden, weight, LogitOptions(scale, softcap, temperature, bias))
    return forward([head], targets, ignore_index, num_scored, stats, cache_rows, frozen)
