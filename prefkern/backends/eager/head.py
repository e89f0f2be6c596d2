"""The head ops in eager PyTorch: full logits of the computed rows, folded and unfolded.

Written for reading; serves any device and dtype and holds [M, V] logits, so it is also the baseline
of tests and benchmarks. Shapes: M computed rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import tables
from ..contract import Folded, Gradients, HeadCall, Tail, written
from .finish import merge, safe, targets_of, weighted
from .gradient import log_mixture_ratio, logit_gradient
from .logits import (
    Logits,
    advantage,
    blend,
    in_top,
    logits_of,
    own_rows,
    put_rows,
    round_to,
    shape,
    slope_of,
    spread_rows,
    take_rows,
)  # fmt: skip

COMPACTS = False
FOLDS_WIDE = False
# Columns of one range of the vocabulary whose sums are formed together. One range would do; several
# keep the merge, which every other backend lives by, in daily use.
RANGE = 1 << 15


def fold(call: HeadCall, kept: int) -> Folded:
    """The first sweep: sums of every row over ranges of the vocabulary, merged."""
    if (rows := own_rows(call)) is not None:
        found = fold(call._replace(rows=rows), kept)
        top = None
        if found.top is not None:
            top = torch.stack([spread_rows(call, rows, x) for x in found.top])
        chunks = found.chunks
        if chunks is not None:
            chunks = torch.stack([spread_rows(call, rows, x) for x in chunks])
        return found._replace(
            top=top, chunks=chunks, sums=spread_rows(call, rows, found.sums),
            at=spread_rows(call, rows, found.at), factors=spread_rows(call, rows, found.factors),
        )  # fmt: skip
    models = [logits_of(call, model, rounded=not call.wide) for model in call.models]
    seen = [m.z for m in models]
    rounded = call.rounds and call.wide
    fields, starts = [], range(0, call.V, RANGE)
    again = None
    if rounded:
        again = shape(round_to(models[0].x, call.working), call.policy)
    for v0 in starts:
        part = [z[:, v0 : v0 + RANGE] for z in seen]
        fields.append(_fields(call, part, v0, None if again is None else again[:, v0 : v0 + RANGE]))
    first = torch.tensor(list(starts), device=seen[0].device)
    sums = merge(call, torch.stack(fields, 1), first, rounded)
    cache = models[0].x.new_empty((call.kept_models, kept, call.V), dtype=call.cache_dtype)
    for i in range(cache.shape[0]):
        cache[i, : call.M] = models[i].x[:kept].to(call.cache_dtype)
        cache[i, call.M :] = 0.0
    folded = Folded(sums, _at(call, seen), cache, _factors(call, seen, sums), rounded)
    if call.plan.has("bkl"):
        folded = folded._replace(top=_top_set(call, seen[1]))
    if call.plan.tail > 0.0:
        masses = [_chunk_lse(z) for z in seen[: call.plan.tail_models]]
        folded = folded._replace(chunks=torch.stack(masses))
    return folded


def fold_again(call: HeadCall, norms: Tensor, cache: Tensor) -> Tensor:
    """The second sweep [SECOND, M], from normalised probabilities."""
    if (rows := own_rows(call)) is not None:
        some = fold_again(call._replace(rows=rows), norms.index_select(1, rows), cache)
        return spread_rows(call, rows, some)
    policy, ref = (logits_of(call, m, rounded=not call.wide).z for m in call.models[:2])
    n = dict(zip(tables.NORMS, norms[:, :, None], strict=True))
    lp = (policy - n["lse"]) - n["lse_low"]
    lr = (ref - n["ref_lse"]) - n["ref_lse_low"]
    p, r = lp.exp(), lr.exp()
    out = norms.new_zeros((len(tables.SECOND), call.M), dtype=torch.float64)
    found = {}
    if call.plan.has("jsd"):
        d = (lr - lp).clamp(-80.0, 80.0)  # beyond, one of the two is e^-80 of the other
        ratio = log_mixture_ratio(d, call.plan.param("jsd"))
        found["kl_pol"], found["kl_ref"] = -weighted(p, ratio), weighted(r, d - ratio)
    if call.plan.has("tv"):
        found["tv"], found["tv_mean"] = (p - r).abs(), p * torch.sign(p - r)
    if call.plan.has("bkl"):
        inside = in_top(ref, n["top_value"], n["top_index"])
        found["top_kl"] = torch.where(inside, weighted(r, lr - lp), 0.0)
        found["rest_ref"] = torch.where(inside, 0.0, r)
        found["rest_pol"] = torch.where(inside, 0.0, p)
    for name, x in found.items():
        out[tables.SECOND.index(name)] = x.sum(1, dtype=torch.float64)
    return out


def unfold(
    call: HeadCall,
    coefficients: Tensor,
    cache: Tensor,
    needed: frozenset[str],
    tail: Tail | None = None,
) -> Gradients:
    """dL/dx of every row and its products with the head (dH) and the hidden rows (dW). Operands of
    products are rounded to the working dtype, sums are fp32 (fp64), results are rounded once."""
    if (rows := own_rows(call)) is not None:
        own = coefficients.index_select(1, rows)
        if tail is not None:
            tail = tail._replace(active=tail.active.index_select(1, rows))
        return unfold(call._replace(rows=rows), own, cache, needed, tail)
    models = [logits_of(call, model, rounded=call.rounds) for model in call.models]
    for i in range(cache.shape[0]):
        kept = min(cache.shape[1], call.M)
        x = torch.cat([cache[i, :kept].to(models[i].x.dtype), models[i].x[kept:]])
        models[i] = Logits(x, shape(x, call.models[i]))
    d = logit_gradient(call, coefficients, [m.z for m in models])
    d = d * slope_of(models[0].z, call.policy)
    if call.given:
        return Gradients(logits=put_rows(call, d).to(call.working))
    dx = round_to(d, call.working)
    found = {}
    policy = call.policy
    extra = None
    if tail is not None:
        active = tail.active.T.repeat_interleave(tables.CHUNK, 1)[:, : call.V]
        dx = torch.where(active, dx, 0.0)
        if tail.spread is not None:
            extra = tail.spread.repeat_interleave(tables.CHUNK, 0)[: call.V]
    assert policy.hidden is not None and policy.weight is not None
    weight = policy.weight.to(call.working).to(dx.dtype)
    if "hidden" in needed:
        found["hidden"] = put_rows(call, dx @ weight).to(call.working)
    depth = policy.hidden.shape[1]
    right = {
        "weight": (policy.hidden, slice(0, depth)),
        "low_out": (policy.low_in, slice(depth, -1)),
        "bias": (None, slice(-1, None)),
    }
    for name in sorted(needed & right.keys()):
        left, columns = right[name]
        like = getattr(policy, name)
        rows = dx.new_ones((dx.shape[0], 1)) if left is None else take_rows(call, left).to(dx.dtype)
        total = dx.T @ rows
        total = total if extra is None else total + extra[:, columns]
        found[name] = total.reshape(like.shape).to(like.dtype)
    if "low_in" in needed:
        assert policy.low_out is not None
        low_out = policy.low_out.to(call.working).to(dx.dtype)
        found["low_in"] = put_rows(call, dx @ low_out).to(call.working)
    return Gradients(**found)


def _fields(call: HeadCall, z: list[Tensor], v0: int, again: Tensor | None) -> Tensor:
    """[FIELDS, M] of one range of columns; `again`: the policy's logits as the backward reads
    them."""
    names = written(call.plan, again is not None)
    tops = [t.amax(1) for t in z]
    x, *others = (t - safe(m)[:, None] for t, m in zip(z, tops, strict=True))
    e = x.exp()
    found = {"max": tops[0], "sum": e.sum(1, dtype=torch.float64)}

    def total(name: str, terms: Tensor) -> None:
        found[name] = terms.sum(1, dtype=torch.float64)

    if again is not None:
        found["round_max"] = again.amax(1)
        total("round_sum", (again - safe(found["round_max"])[:, None]).exp())
    if "x" in names:
        total("x", weighted(e, x))
    if "sq" in names:
        total("sq", e * e)
    if "z_sum" in names:
        finite = z[0] != -math.inf
        total("z_sum", torch.where(finite, z[0], 0.0))
        total("z_count", finite.to(e.dtype))
    if "top" in names:
        columns = torch.arange(x.shape[1], device=x.device)
        first = torch.where(z[0] == tops[0][:, None], columns, x.shape[1])
        found["top"] = first.amin(1).double()
    if "ref_max" in names:
        er = others[0].exp()
        found["ref_max"] = tops[1]
        total("ref_sum", er)
        if "ref_cross" in names:
            total("ref_cross", weighted(er, others[0] - x))
        if "pol_cross" in names:
            total("pol_cross", weighted(e, x - others[0]))
        for name in ("alpha", "renyi", "mix"):
            if f"{name}_max" in names:
                u = blend(x, others[0], call.plan.param(name))
                found[f"{name}_max"] = u.amax(1)
                total(f"{name}_sum", (u - safe(found[f"{name}_max"])[:, None]).exp())
    if "aux_max" in names:
        found["aux_max"] = tops[2]
        total("aux_sum", others[1].exp())
        total("adv", weighted(e, others[1] - others[0]))
    elif "adv" in names:
        total("adv", weighted(e, advantage(call, slice(v0, v0 + x.shape[1]), x)))
    rows = x.new_zeros((len(tables.FIELDS), x.shape[0]), dtype=torch.float64)
    for name, value in found.items():
        rows[tables.FIELDS.index(name)] = value
    return rows


def _at(call: HeadCall, z: list[Tensor]) -> Tensor:
    """[AT, M]: the target's logits, 0 where the target is out of range, and the teacher's sum."""
    y, _ = targets_of(call)
    here = (y >= 0) & (y < call.V)
    out = z[0].new_zeros((len(tables.AT), call.M), dtype=torch.float64)
    for i, t in enumerate(z[:2]):
        found = t.gather(1, torch.where(here, y, 0)[:, None])[:, 0].double()
        out[i] = torch.where(here, found, 0.0)
    if call.plan.has("xent"):
        assert call.values is not None and call.values_index is not None
        q, index = take_rows(call, call.values).double(), take_rows(call, call.values_index)
        out[2] = weighted(q, z[0].gather(1, index).double()).sum(1)
    return out


def _top_set(call: HeadCall, zr: Tensor) -> Tensor:
    """[2, k, M]: the reference's k largest logits and their columns, ties to the lower column."""
    k = min(int(call.plan.param("bkl")), call.V)
    value, column = torch.sort(zr, dim=1, descending=True, stable=True)
    return torch.stack([value[:, :k].double().T, column[:, :k].double().T])


def _chunk_lse(z: Tensor) -> Tensor:
    """[C, M] log-sum-exp of every chunk of z [M, V]."""
    return torch.stack([part.logsumexp(1) for part in z.split(tables.CHUNK, 1)])


def _factors(call: HeadCall, z: list[Tensor], sums: Tensor) -> Tensor:
    """[factors, M, D + r] sums of head rows relative to the row's maxima; [0] without a frozen
    head."""
    policy = call.policy
    if not call.plan.frozen:
        return sums.new_empty(0, dtype=call.fold_dtype)
    assert policy.weight is not None
    top = [sums[tables.FIELDS.index(n)].to(z[0].dtype) for n in ("max", "ref_max")]
    x = z[0] - safe(top[0])[:, None]
    e = x.exp()
    terms = {"mass": e, "log": weighted(e, x)}
    if call.plan.two_models:
        xr = z[1] - safe(top[1])[:, None]
        terms |= {"gap": e - xr.exp(), "cross": weighted(e, x - xr)}
    slope = slope_of(z[0], policy)
    heads = [
        h.to(call.working).to(x.dtype) for h in (policy.weight, policy.low_out) if h is not None
    ]
    made = (weighted(terms[name], slope * torch.ones_like(x)) for name in call.plan.factors)
    return torch.stack([torch.cat([t @ h for h in heads], 1) for t in made])
