"""A head whose vocabulary rows lie on several ranks: sums travel, never logits, never the weight.

Every rank folds its own rows of the head; the sums of a row merge over ranks by the function that
merges them over tiles, so every statistic and every gradient is the whole head's. What travels, per
computed token and rank, whatever the vocabulary is:

    forward     8 bytes per field its statistics need (2 for logp, 5 for logp + ref_logp + fkl) and
                per logit of a target: one all-gather. jsd, tv and bkl: 8 bytes per sum of the
                second sweep, one all-reduce more; bkl also its k largest reference logits, one
                all-gather
    backward    the gradient of the hidden state and of left factors, D + r numbers: one all-reduce,
                or one reduce-scatter where ranks bring other tokens
    tokens other than "same": targets and hidden states of every model, gathered in both directions,
                8 bytes per call to know how many, and the statistics' gradients in the backward
    tail_mass   the log-sum-exp of every chunk, 4 bytes per 1,024 columns of the vocabulary and
                model (one all-gather), and one number (one all-reduce)

Shapes: R ranks, M computed rows, V rows of the local head, D hidden size, n statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import frozen, tables
from ..backends.contract import Folded, Gradients, HeadCall, Model, written
from ..backends.plan import Plan, ShardPlan
from ..head import Head
from ..shard import Shard
from . import budget, tail
from .collectives import all_gather, all_reduce, reduce_scatter
from .scored import scored_rows

# Labels of local columns can be any small negative number, so ignored rows get one that cannot.
IGNORED = torch.iinfo(torch.int64).min


class Local(NamedTuple):
    """A call as this rank sees it."""

    whole: HeadCall  # every rank's tokens, labels of the whole vocabulary
    own: HeadCall  # the same tokens, labels counted from the first local row
    counts: list[int]  # tokens of each rank; one entry where all ranks have the same

    @property
    def mine(self) -> slice:
        """This rank's tokens among all."""
        shard = self.whole.shard
        assert shard is not None
        if len(self.counts) == 1:
            return slice(0, self.counts[0])
        start = sum(self.counts[: shard.rank])
        return slice(start, start + self.counts[shard.rank])


def locate(heads: Sequence[Head]) -> tuple[ShardPlan, list[Head]]:
    """The place of the policy's rows, and all heads cut to it: a head that is whole on every rank
    (a reference beside a sharded policy, say) gives the rows of the policy's shard.

    Raises:
        ValueError: heads that are sharded differently, rows that do not fit the vocabulary, a
            policy's head that is whole and wants a gradient.
    """
    for head in heads:
        if head.shard is not None:
            break
    shard = head.shard
    assert shard is not None
    if heads[0].shard is None and heads[0].requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "a policy's head beside a sharded reference must be sharded too where it trains, got "
            f"a whole one {list(heads[0].weight.shape)}: every rank would find the gradient of "
            "its own rows alone. Pass its rows with the reference's Shard, or a detached head."
        )
    return shard.plan(), [_cut(h, shard) for h in heads]


def _cut(head: Head, shard: Shard) -> Head:
    plan = shard.plan()
    ends = (*plan.starts[1:], plan.total)
    rows = ends[plan.rank] - plan.start
    if head.shard is not None:
        if head.shard.plan() != plan or head.weight.shape[0] != rows:
            raise ValueError(
                f"sharded heads of one call must hold the same rows, here {rows} from "
                f"{plan.start} on, for the same tokens; got {list(head.weight.shape)} with "
                f"{head.shard.plan()}."
            )
        return head
    if head.weight.shape[0] != plan.total:
        raise ValueError(
            f"a whole head beside a sharded one must have its vocabulary of {plan.total}, got "
            f"{list(head.weight.shape)}; pass its shard, or pad it with a bias of -inf."
        )
    mine = slice(plan.start, plan.start + rows)
    return replace(
        head,
        weight=head.weight[mine],
        bias=None if head.bias is None else head.bias[mine],
        low_rank=[(u, b[mine]) for u, b in head.low_rank],
        shard=shard,
    )


def localise(call: HeadCall) -> Local:
    """Gathers the tokens of all ranks, where each brings its own."""
    shard = call.shard
    assert shard is not None
    counts = [call.N]
    if shard.tokens != "same":
        counts = _counts(call)
        policy, ref, aux = (_gather_model(m, counts, shard.group)
                            for m in (call.policy, call.ref, call.aux))  # fmt: skip
        assert policy is not None
        index = call.values_index
        call = call._replace(
            policy=policy, ref=ref, aux=aux,
            targets=gather_rows(call.targets, counts, shard.group), rows=None,
            values=call.values if index is None or call.values is None
            else gather_rows(call.values, counts, shard.group),
            values_index=None if index is None else gather_rows(index, counts, shard.group),
        )  # fmt: skip
        if call.targets.device.type != "cpu":
            call = call._replace(rows=scored_rows(call.targets, call.ignore_index, None))
    live = call.targets != call.ignore_index
    values, index = _local_values(call)
    own = call._replace(
        targets=torch.where(live, call.targets - shard.start, IGNORED), ignore_index=IGNORED,
        values=values, values_index=index,
    )  # fmt: skip
    return Local(call, own, counts)


def forward(module: ModuleType, call: HeadCall, kept: int) -> tuple[Tensor, ...]:
    """(out of the own tokens, saved, cache, factors, skipped) of a sharded call, as of a whole one.
    Where ranks bring other tokens, the values of all of them stand below `saved`."""
    local = localise(call)
    whole, arithmetic = local.whole, module.arithmetic
    kept = budget.cut_rows(kept, whole.M, local.own.V, whole.targets.device)
    folded = _fold(module, local.own, kept)
    merged = _merge(module, local, folded)
    second = None
    if whole.plan.second:
        norms = arithmetic.norms(whole, merged)
        part = _fold_again(module, local.own, norms, folded.cache)
        second = all_reduce(part, _group(whole))
    out, saved = arithmetic.finish(whole, merged, second)
    factors = folded.factors
    if whole.plan.frozen:
        factors = frozen.normalise(local.own, factors, folded.sums, merged.sums)
    if len(local.counts) > 1:
        saved = torch.cat([saved, out.double()])
    skipped = tail.choose(whole, local.own, merged)
    out = tail.with_share(whole, out, skipped)
    if whole.rows is not None:
        out = out.new_zeros((out.shape[0], whole.N)).index_copy_(1, whole.rows, out)
    return out[:, local.mine].contiguous(), saved, folded.cache, factors, skipped


def backward(
    module: ModuleType,
    call: HeadCall,
    d_out: Tensor,  # [n, N] of the own tokens
    out: Tensor,  # [n, N]
    saved: Tensor,
    cache: Tensor,
    factors: Tensor,
    skipped: Tensor,
    needed: frozenset[str],
) -> Gradients:
    """Gradients of the own hidden states, and of the local rows of the head."""
    local = localise(call)
    whole, group = local.whole, _group(local.whole)
    if len(local.counts) > 1:
        d_out = gather_rows(d_out.T.contiguous(), local.counts, group).T.contiguous()
        saved, out = saved[: whole.plan.saved_rows], saved[whole.plan.saved_rows :]
        if whole.rows is not None:
            d_out = d_out.index_select(1, whole.rows)
    elif whole.rows is not None:
        d_out, out = (x.index_select(1, whole.rows) for x in (d_out, out))
    out = out.to(whole.fold_dtype).contiguous()
    coefficients = module.arithmetic.pull(whole, d_out.contiguous(), out, saved.contiguous())
    if local.own.V == 0:
        found = _no_rows(local.own, needed)
    elif whole.plan.frozen:
        found = frozen.gradient(local.own, coefficients, factors, saved, needed)
    else:
        units = tail.units(local.own, coefficients, skipped, needed)
        found = module.unfold(local.own, coefficients, cache, needed, units)
    return _share(local, found)


def _group(call: HeadCall) -> str:
    assert call.shard is not None
    return call.shard.group


def _share(local: Local, found: Gradients) -> Gradients:
    """Left factors get the sum over ranks. Right factors have every token's gradient already; where
    ranks are data parallel the others' gradients are means over ranks, and so are these."""
    shard = local.whole.shard
    assert shard is not None
    made = {}
    left = {n: g for n in ("hidden", "low_in") if (g := getattr(found, n)) is not None}
    if left:
        joined = torch.cat(list(left.values()), 1) if len(left) > 1 else next(iter(left.values()))
        parts = _sum_rows(joined, local.counts, shard).split([g.shape[1] for g in left.values()], 1)
        made = {name: part.contiguous() for name, part in zip(left, parts, strict=True)}
    if shard.tokens == "own":
        for name in ("weight", "bias", "low_out"):
            if (grad := getattr(found, name)) is not None:
                made[name] = grad / shard.world
    return found._replace(**made)


# ---- the sums ------------------------------------------------------------------------------------


def _fold(module: ModuleType, own: HeadCall, kept: int) -> Folded:
    if own.V > 0:
        return module.fold(own, kept)
    like = own.targets
    sums = like.new_zeros((len(tables.FIELDS), own.M), dtype=torch.float64)
    for i, name in enumerate(tables.FIELDS):
        if name.endswith("max"):
            sums[i] = -torch.inf
    depth = _depth(own.policy)
    factors = (len(own.plan.factors), own.M, depth) if own.plan.frozen else (0,)
    top = None
    if own.plan.has("bkl"):
        top = like.new_zeros((2, 1, own.M), dtype=torch.float64)
        top[0] = -torch.inf
    return Folded(
        sums,
        like.new_zeros((len(tables.AT), own.M), dtype=torch.float64),
        like.new_empty((own.kept_models, kept, 0), dtype=own.cache_dtype),
        like.new_zeros(factors, dtype=own.fold_dtype),
        top=top,
        chunks=like.new_zeros((own.plan.tail_models, 0, own.M), dtype=own.fold_dtype),
    )


def _fold_again(module: ModuleType, own: HeadCall, norms: Tensor, cache: Tensor) -> Tensor:
    if own.V > 0:
        return module.fold_again(own, norms, cache)
    return own.targets.new_zeros((len(tables.SECOND), own.M), dtype=torch.float64)


def _merge(module: ModuleType, local: Local, folded: Folded) -> Folded:
    """The sums of all ranks: one all-gather, then the merge of tiles."""
    call = local.whole
    shard = call.shard
    assert shard is not None
    # a rank without rows folds nothing, and all ranks must send the same rows
    rounded = local.own.rounds and (local.own.wide or module.FOLDS_WIDE)
    names = written(call.plan, rounded)
    at = [i for i, name in enumerate(tables.AT) if reads(call.plan, name)]
    fields = [tables.FIELDS.index(name) for name in names]
    packed = torch.cat([folded.sums[fields], folded.at[at]])
    every = all_gather(packed, shard.group)  # [R, rows, M]
    table = every.new_zeros((len(tables.FIELDS), shard.world, call.M))
    table[fields] = every[:, : len(fields)].transpose(0, 1)
    starts = torch.tensor(shard.starts, device=every.device)
    # the local sums count `top` from the local head's first row
    sums = module.arithmetic.merge(call, table, starts, rounded)
    at_all = torch.zeros_like(folded.at)
    at_all[at] = every[:, len(fields) :].sum(0)
    return folded._replace(sums=sums, at=at_all, rounded=rounded, top=_merge_top(call, folded.top))


def reads(plan: Plan, name: str) -> bool:
    """Whether a call needs a number of tables.AT."""
    if name == "taught":
        return plan.has("xent")
    return name == "zy" or plan.two_models


def _merge_top(call: HeadCall, top: Tensor | None) -> Tensor | None:
    """[2, k, M] largest reference logits of the whole vocabulary and their columns, from those of
    every rank; equal ones by the lower column."""
    if top is None:
        return None
    shard = call.shard
    assert shard is not None
    k = min(int(call.plan.param("bkl")), call.total)
    room = top.new_full((2, k, call.M), -torch.inf)
    room[0, : top.shape[1]], room[1, : top.shape[1]] = top[0], top[1] + shard.start
    room[1, top.shape[1] :] = float(call.total)
    value, column = all_gather(room, shard.group).transpose(0, 1).reshape(2, -1, call.M)
    by_column = torch.argsort(column, dim=0, stable=True)
    value, column = value.gather(0, by_column), column.gather(0, by_column)
    by_value = torch.argsort(value, dim=0, descending=True, stable=True)[:k]
    return torch.stack([value.gather(0, by_value), column.gather(0, by_value)])


# ---- tokens --------------------------------------------------------------------------------------


def _depth(model: Model) -> int:
    assert model.hidden is not None
    return model.hidden.shape[1] + (0 if model.low_in is None else model.low_in.shape[1])


def _counts(call: HeadCall) -> list[int]:
    """Tokens of every rank; while tracing they must be as many as here."""
    shard = call.shard
    assert shard is not None
    mine = torch.tensor([call.N], device=call.targets.device)
    return all_gather(mine, shard.group).flatten().tolist()


def _gather_model(model: Model | None, counts: list[int], group: str) -> Model | None:
    if model is None:
        return None

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else gather_rows(x, counts, group)

    return model._replace(hidden=wide(model.hidden), low_in=wide(model.low_in))


def gather_rows(x: Tensor, counts: list[int], group: str) -> Tensor:
    """[N, ...] of every rank, one after the other; ranks may have other numbers of rows."""
    most = max(counts)
    if x.shape[0] < most:
        x = torch.cat([x, x.new_zeros((most - x.shape[0], *x.shape[1:]))])
    every = all_gather(x.contiguous(), group)
    return torch.cat([part[:n] for part, n in zip(every, counts, strict=True)])


def _sum_rows(x: Tensor, counts: list[int], shard: ShardPlan) -> Tensor:
    """x [N of all ranks, D] -> this rank's rows of the sum over ranks."""
    if len(counts) == 1:
        return all_reduce(x, shard.group)
    most = max(counts)
    if min(counts) < most:
        padded = x.new_zeros((len(counts), most, *x.shape[1:]))
        for place, part in zip(padded, x.split(counts), strict=True):
            place[: part.shape[0]] = part
        x = padded
    x = x.reshape(len(counts), most, -1)
    return reduce_scatter(x, shard.group)[: counts[shard.rank]]


def _local_values(call: HeadCall) -> tuple[Tensor | None, Tensor | None]:
    """Given values on the local columns: sparse entries of other ranks weigh 0."""
    shard = call.shard
    assert shard is not None
    if call.values is None:
        return None, None
    if call.values_index is None:
        return call.values[shard.start : shard.start + call.V].contiguous(), None
    index = call.values_index - shard.start
    here = (index >= 0) & (index < call.V)
    values = torch.where(here, call.values, torch.zeros_like(call.values))
    return values, torch.where(here, index, 0)


def _no_rows(own: HeadCall, needed: frozenset[str]) -> Gradients:
    """Gradients of a rank that holds no row."""
    found = {name: torch.zeros_like(getattr(own.policy, name)) for name in needed}
    return Gradients(**found)
