"""Which units of a backward are computed: `tail_mass`.

A chunk is a fixed range of vocabulary columns, a unit one row of one chunk. The fold keeps the
log-sum-exp of every chunk, so the mass of a unit is known before the backward and costs no sweep.
In every row the units of smallest mass max(P, R) that add up to at most e are left out (R only
where r stands in the gradient); the units of the target and of a sparse teacher's entries never
are. What a row of dz then lacks is at most |upstream| e in L1 for logp and lse, e times the
teacher's mass for xent, and 2 e for fkl.

dH leaves a skipped unit out. dW, d bias and d low_out get its sum of dz, spread evenly over the
chunk, so that every row of the head keeps a gradient of the right direction; a soft cap's slope is
taken as 1 there.

Shapes: M computed rows, C chunks, V vocabulary, D hidden size, r rank of low-rank terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import tables
from ..backends.contract import Backend, Folded, HeadCall, Tail
from ..backends.plan import ShardPlan, read_plan, write_plan
from .collectives import all_gather, all_reduce

RIGHT_FACTORS = frozenset({"weight", "bias", "low_out"})
# Rows whose hidden states are widened together for the spread.
BLOCK = 1024
# The frozen scheme forms dH in one pass and keeps no logits. With a tail they are kept and read
# again, which costs 4 % (fp32) to 7 % (bf16) more where every unit is needed. So a call of at least
# LEAST rows asks SAMPLE of them, spread evenly over the call, at 1 % of a step of 2,048 rows, and
# takes the frozen scheme where the share of their units that is needed is FLAT or above.
SAMPLE, LEAST, FLAT = 32, 1024, 0.9
COMPUTED, FORMED = -1.0, -2.0  # in `skipped`: the backward's to compute; formed by the forward


def check_tail_mass(tail_mass: float) -> None:
    number = isinstance(tail_mass, (int, float)) and not isinstance(tail_mass, bool)
    if not number or not 0.0 <= tail_mass <= 1.0:
        raise ValueError(
            f"tail_mass must be a probability mass in [0, 1], got {tail_mass!r}; 0 computes every "
            "unit, 2**-10 stays far below the rounding of bfloat16."
        )


def choose(call: HeadCall, own: HeadCall, folded: Folded) -> Tensor:
    """[tail_models, C, M] fold dtype: the masses of a unit that is skipped, -1 where it is
    computed; [0] without a tail.

    call: labels count from the first row of the whole vocabulary. own: the same call as this rank
    sees it, whose C chunks `folded` holds beside the sums of the whole row.
    """
    chunks, firsts, mine = folded.chunks, _firsts(own.V, 0), slice(None)
    if call.plan.tail == 0.0 or chunks is None:
        return folded.sums.new_empty(0, dtype=call.fold_dtype)
    if (shard := call.shard) is not None:
        chunks, firsts, mine = _of_all_ranks(chunks, shard)
    names = ("", "ref_")[: chunks.shape[0]]
    mass = (chunks - torch.stack([_lse(folded, name) for name in names])[:, None]).exp()
    joint = mass.amax(0).double()
    y = call.targets if call.rows is None else call.targets.index_select(0, call.rows)
    joint = _keep(joint, firsts, y[None])
    if call.plan.grows("xent"):
        assert call.values_index is not None
        index = call.values_index
        index = index if call.rows is None else index.index_select(0, call.rows)
        joint = _keep(joint, firsts, index.T)
    ordered, order = torch.sort(joint, dim=0, stable=True)
    skipped = torch.zeros_like(joint, dtype=torch.bool)
    skipped.scatter_(0, order, ordered.cumsum(0) <= call.plan.tail)
    return torch.where(skipped, mass, COMPUTED)[:, mine].to(call.fold_dtype).contiguous()


def is_flat(module: Backend, call: HeadCall) -> bool:
    """Whether the frozen scheme is the faster one for a call that may take either."""
    if not call.plan.either or call.rows is not None:
        return False
    live = (call.targets != call.ignore_index).nonzero()[:, 0]
    if len(live) < LEAST:
        return False
    at = torch.arange(SAMPLE, device=live.device) * len(live) // SAMPLE
    some = call._replace(rows=live[at])
    plan = call.plan
    text = write_plan(plan.stats, plan.no_grad, some.present(), short=False, tail=plan.tail)
    some = some._replace(plan=read_plan(text))
    skipped = choose(some, some, module.fold(some, 0))
    return float((skipped[0] < 0).double().mean()) >= FLAT


def all_formed(call: HeadCall) -> Tensor:
    """`choose` of a call whose forward has formed dH: nothing is skipped."""
    shape = (call.plan.tail_models, call.chunks, call.M)
    return torch.full(shape, FORMED, dtype=call.fold_dtype, device=call.targets.device)


def is_formed(skipped: Tensor) -> bool:
    """Reads a number of the device: for calls that may take either scheme."""
    return skipped.numel() > 0 and float(skipped.view(-1)[0]) == FORMED


def with_share(call: HeadCall, out: Tensor, skipped: Tensor) -> Tensor:
    """out [n, M] with one row more where there is a tail: the share of a row's units that are
    computed, of all ranks' where the head is sharded."""
    if call.plan.tail == 0.0:
        return out
    y = call.targets if call.rows is None else call.targets.index_select(0, call.rows)
    active = (skipped[0] < 0).sum(0).to(out.dtype)
    total = call.chunks
    if (shard := call.shard) is not None:
        active = all_reduce(active, shard.group)
        total = sum(_chunks_of(shard))
    found = torch.where(y != call.ignore_index, active / total, 0.0)
    return torch.cat([out, found[None]])


def units(
    call: HeadCall, coefficients: Tensor, skipped: Tensor, needed: frozenset[str]
) -> Tail | None:
    """The units of an `unfold`; coefficients [COEFFICIENTS, M]."""
    if call.plan.tail == 0.0:
        return None
    active = skipped[0] < 0
    spread = None
    if needed & RIGHT_FACTORS:
        a0, fkl = (coefficients[tables.COEFFICIENTS.index(name)] for name in ("a0", "fkl"))
        d = (a0 + fkl) * skipped[0]
        if skipped.shape[0] > 1:
            d = d - fkl * skipped[1]
        d = torch.where(active, 0.0, d) / _lengths(call.V, d.device).to(d.dtype)[:, None]
        spread = _times_rows(call, d)
    return Tail(active, spread)


def _lse(folded: Folded, prefix: str) -> Tensor:  # [M] of the logits that were folded
    top, total = (folded.sums[tables.FIELDS.index(prefix + n)] for n in ("max", "sum"))
    return torch.where(top == -math.inf, 0.0, top) + total.log()


def _firsts(vocabulary: int, start: int) -> list[int]:
    """First column of every chunk."""
    return list(range(start, start + vocabulary, tables.CHUNK))


def _lengths(vocabulary: int, device: torch.device) -> Tensor:  # [C]
    ends = [*_firsts(vocabulary, 0), vocabulary]
    return torch.tensor(ends, device=device).diff()


def _chunks_of(shard: ShardPlan) -> list[int]:
    """Chunks of every rank."""
    ends = (*shard.starts[1:], shard.total)
    return [len(_firsts(b - a, a)) for a, b in zip(shard.starts, ends, strict=True)]


def _of_all_ranks(chunks: Tensor, shard: ShardPlan) -> tuple[Tensor, list[int], slice]:
    """(chunks of every rank side by side, their first columns, which of them are this rank's)."""
    counts = _chunks_of(shard)
    room = chunks.new_zeros((chunks.shape[0], max(counts), chunks.shape[2]))
    room[:, : chunks.shape[1]] = chunks
    every = all_gather(room, shard.group)
    ends = (*shard.starts[1:], shard.total)
    firsts = [c for a, b in zip(shard.starts, ends, strict=True) for c in _firsts(b - a, a)]
    start = sum(counts[: shard.rank])
    mine = slice(start, start + counts[shard.rank])
    return torch.cat([x[:, :n] for x, n in zip(every, counts, strict=True)], 1), firsts, mine


def _keep(joint: Tensor, firsts: list[int], columns: Tensor) -> Tensor:
    """joint [C, M] with an infinite mass in the chunks of columns [k, M]."""
    edges = torch.tensor(firsts, device=joint.device)
    at = torch.searchsorted(edges, columns.contiguous(), right=True) - 1
    here = torch.full_like(at, 1, dtype=joint.dtype) * math.inf
    return joint.scatter(0, at.clamp(0, len(firsts) - 1), here)


def _times_rows(call: HeadCall, d: Tensor) -> Tensor:
    """d [C, M] times (hidden, low_in, 1) of the computed rows: [C, D + r + 1]."""
    policy = call.policy
    left = [x for x in (policy.hidden, policy.low_in) if x is not None]
    total = d.new_zeros((d.shape[0], sum(x.shape[1] for x in left) + 1))
    total[:, -1] = d.sum(1)
    for r0 in range(0, call.M, BLOCK):
        rows = slice(r0, r0 + BLOCK)
        at = call.rows[rows] if call.rows is not None else rows
        some, live = d[:, rows], (call.targets[at] != call.ignore_index)[:, None]
        begin = 0
        for x in left:
            # rows that do not count may hold NaN, which times 0 would stay
            wide = torch.where(live, x[at].to(d.dtype), 0.0)
            total[:, begin : begin + x.shape[1]].addmm_(some, wide)
            begin += x.shape[1]
    return total
