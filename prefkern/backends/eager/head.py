"""The head ops in eager PyTorch: full logits of the computed rows, folded and unfolded.

Written for reading; serves any device and dtype and holds [M, V] logits, so it is also the baseline
of tests and benchmarks. Shapes: M computed rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tables
from ..contract import Folded, Gradients, HeadCall, Model, Tail, written
from .finish import merge, safe, targets_of, weighted

COMPACTS = False
FOLDS_WIDE = False
# Columns of one range of the vocabulary whose sums are formed together. One range would do; several
# keep the merge, which every other backend lives by, in daily use.
RANGE = 1 << 15


class Logits(NamedTuple):
    """Products of one model and what became of them."""

    x: Tensor  # [M, V] raw products, fold dtype
    z: Tensor  # [M, V] logits


def fold(call: HeadCall, kept: int) -> Folded:
    """The first sweep: sums of every row over ranges of the vocabulary, merged."""
    if (rows := _own_rows(call)) is not None:
        found = fold(call._replace(rows=rows), kept)
        top = None
        if found.top is not None:
            top = torch.stack([_spread(call, rows, x) for x in found.top])
        chunks = found.chunks
        if chunks is not None:
            chunks = torch.stack([_spread(call, rows, x) for x in chunks])
        return found._replace(
            top=top, chunks=chunks, sums=_spread(call, rows, found.sums),
            at=_spread(call, rows, found.at), factors=_spread(call, rows, found.factors),
        )  # fmt: skip
    models = [_logits(call, model, rounded=not call.wide) for model in call.models]
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
    if (rows := _own_rows(call)) is not None:
        some = fold_again(call._replace(rows=rows), norms.index_select(1, rows), cache)
        return _spread(call, rows, some)
    policy, ref = (_logits(call, m, rounded=not call.wide).z for m in call.models[:2])
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
        inside = _in_top(ref, n["top_value"], n["top_index"])
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
    if (rows := _own_rows(call)) is not None:
        own = coefficients.index_select(1, rows)
        if tail is not None:
            tail = tail._replace(active=tail.active.index_select(1, rows))
        return unfold(call._replace(rows=rows), own, cache, needed, tail)
    models = [_logits(call, model, rounded=call.rounds) for model in call.models]
    for i in range(cache.shape[0]):
        kept = min(cache.shape[1], call.M)
        x = torch.cat([cache[i, :kept].to(models[i].x.dtype), models[i].x[kept:]])
        models[i] = Logits(x, shape(x, call.models[i]))
    d = _logit_gradient(call, coefficients, [m.z for m in models])
    d = d * _slope(models[0].z, call.policy)
    if call.given:
        return Gradients(logits=_put(call, d).to(call.working))
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
        found["hidden"] = _put(call, dx @ weight).to(call.working)
    depth = policy.hidden.shape[1]
    right = {
        "weight": (policy.hidden, slice(0, depth)),
        "low_out": (policy.low_in, slice(depth, -1)),
        "bias": (None, slice(-1, None)),
    }
    for name in sorted(needed & right.keys()):
        left, columns = right[name]
        like = getattr(policy, name)
        rows = dx.new_ones((dx.shape[0], 1)) if left is None else _take(call, left).to(dx.dtype)
        total = dx.T @ rows
        total = total if extra is None else total + extra[:, columns]
        found[name] = total.reshape(like.shape).to(like.dtype)
    if "low_in" in needed:
        assert policy.low_out is not None
        low_out = policy.low_out.to(call.working).to(dx.dtype)
        found["low_in"] = _put(call, dx @ low_out).to(call.working)
    return Gradients(**found)


# ---- logits --------------------------------------------------------------------------------------


def _own_rows(call: HeadCall) -> Tensor | None:
    """Rows that count, found here where none were given and reading targets waits for nobody."""
    if call.rows is not None or call.given or call.targets.device.type != "cpu":
        return None
    return (call.targets != call.ignore_index).nonzero().flatten()


def _spread(call: HeadCall, rows: Tensor, x: Tensor) -> Tensor:
    """[k, M, ...] back to [k, N, ...]; an empty x stays empty."""
    if x.dim() < 2:
        return x
    return x.new_zeros((x.shape[0], call.N, *x.shape[2:])).index_copy_(1, rows, x)


def _take(call: HeadCall, x: Tensor) -> Tensor:
    """Computed rows [M, ...]; rows that do not count become 0, so that NaN or inf in them cannot
    spread."""
    if call.rows is not None:
        return x.index_select(0, call.rows)
    live = targets_of(call)[1].reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(live, x, torch.zeros_like(x))


def _put(call: HeadCall, x: Tensor) -> Tensor:
    """[M, ...] back to [N, ...], exactly 0 in rows that were not computed or do not count."""
    if call.rows is not None:
        return x.new_zeros((call.N, *x.shape[1:])).index_copy_(0, call.rows, x)
    live = targets_of(call)[1].reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(live, x, torch.zeros_like(x))


def _logits(call: HeadCall, model: Model, *, rounded: bool) -> Logits:
    """Raw products and logits [M, V]. rounded: products in the working dtype; else 16-bit operands
    are multiplied in fp32."""
    acc = call.fold_dtype
    if model.logits is not None:
        x = _take(call, model.logits).to(acc)
        return Logits(x, shape(x, model))
    assert model.hidden is not None and model.weight is not None
    pairs = [(_take(call, model.hidden), model.weight)]
    if model.low_in is not None and model.low_out is not None:
        pairs.append((_take(call, model.low_in), model.low_out))
    x = functools.reduce(Tensor.add, (a.to(acc) @ b.to(call.working).to(acc).T for a, b in pairs))
    if rounded:
        x = round_to(x, call.working)
    return Logits(x, shape(x, model))


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the working dtype, before bias, scale and cap: the slope of a cap near saturation
    would not survive rounding after it."""
    return x.to(dtype).to(x.dtype)


def shape(x: Tensor, model: Model) -> Tensor:
    """softcap * tanh(scale * (x + bias) / softcap) / temperature."""
    if model.bias is not None:
        x = x + model.bias.to(x.dtype)
    if model.softcap == 0.0:
        return x * (model.scale / model.temperature)
    cap = model.softcap
    return cap / model.temperature * torch.tanh(x * (model.scale / cap))


def _slope(z: Tensor, model: Model) -> Tensor | float:
    """The variable part of dz/dx."""
    if model.softcap == 0.0:
        return 1.0
    return 1.0 - (z * (model.temperature / model.softcap)) ** 2


# ---- the first sweep -----------------------------------------------------------------------------


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


def blend(x: Tensor, xr: Tensor, a: float) -> Tensor:
    """x + a (xr - x), -inf wherever a term with weight is -inf."""
    if a == 0 or a == 1:
        return x if a == 0 else xr
    u = x + a * (xr - x)
    return torch.where(u == u, u, -math.inf)


def advantage(call: HeadCall, columns: slice, like: Tensor) -> Tensor:
    """Given A of ev on some columns: [w], or [M, w] from sparse values."""
    assert call.values is not None
    if call.values_index is None:
        return call.values[columns].to(like.dtype)
    values, index = _take(call, call.values).to(like.dtype), _take(call, call.values_index)
    width = columns.stop - columns.start
    inside = (index >= columns.start) & (index < columns.stop)
    dense = like.new_zeros((like.shape[0], width))
    local = torch.where(inside, index - columns.start, 0)
    return dense.scatter_add(1, local, torch.where(inside, values, 0.0))


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
        q, index = _take(call, call.values).double(), _take(call, call.values_index)
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


def _in_top(zr: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """[M, V] bool; value and index [M, 1]."""
    columns = torch.arange(zr.shape[1], device=zr.device)
    return (zr > value) | ((zr == value) & (columns <= index))


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
        terms |= {"ref": xr.exp(), "cross": weighted(e, x - xr)}
    slope = _slope(z[0], policy)
    heads = [
        h.to(call.working).to(x.dtype) for h in (policy.weight, policy.low_out) if h is not None
    ]
    made = (weighted(terms[name], slope * torch.ones_like(x)) for name in call.plan.factors)
    return torch.stack([torch.cat([t @ h for h in heads], 1) for t in made])


# ---- the gradient --------------------------------------------------------------------------------


def log_mixture_ratio(d: Tensor, b: float) -> Tensor:
    """log of (b r + (1-b) p) / p from d = log r - log p, |d| <= 80; d = 0 gives exactly 0."""
    return torch.log1p(b * torch.expm1(d))


def _power(x: Tensor, xr: Tensor, a: float, shift: Tensor) -> Tensor:
    """e^(x + a (xr - x) - shift), 0 where a term with weight is -inf."""
    return (blend(x, xr, a) - shift).exp()


def _logit_gradient(call: HeadCall, coefficients: Tensor, z: list[Tensor]) -> Tensor:
    """dL/dz [M, V], up to dz/dx's variable part; the formula stands beside tables.COEFFICIENTS."""
    plan = call.plan
    g = dict(zip(tables.COEFFICIENTS, coefficients[:, :, None], strict=True))
    lp = (z[0] - g["lse"]) - g["lse_low"]
    p = lp.exp()
    inner = g["a0"].expand_as(p)
    if plan.grows("ent"):
        inner = inner + g["ent"] * (lp + g["ent_value"])
    if plan.grows("col"):
        inner = inner + g["col"] * (p - g["col_value"])
    lr = r = lp
    if plan.two_models:
        lr = (z[1] - g["ref_lse"]) - g["ref_lse_low"]
        r = lr.exp()
    if plan.grows("rkl"):
        inner = inner + g["rkl"] * ((lp - lr) - g["rkl_value"])
    if plan.grows("ev"):
        if plan.ev == "aux":
            a = ((z[2] - g["aux_lse"]) - g["aux_lse_low"]) - lr
        else:
            a = advantage(call, slice(0, call.V), p)
        inner = inner + g["ev"] * (a - g["ev_value"])
    if plan.grows("tv"):
        inner = inner + g["tv"] * (torch.sign(p - r) - g["tv_mean"])
    if plan.grows("jsd"):
        ratio = log_mixture_ratio((lr - lp).clamp(-80.0, 80.0), plan.param("jsd"))
        inner = inner - g["jsd"] * (ratio + g["jsd_kl"])
    d = weighted(p, inner)
    if plan.grows("fkl"):
        d = d + g["fkl"] * (p - r)
    if plan.grows("alpha"):
        d = d + g["alpha"] * (_power(lp, lr, plan.param("alpha"), torch.zeros_like(lp)) - p)
    if plan.grows("renyi"):
        d = d + g["renyi"] * (_power(lp, lr, plan.param("renyi"), g["renyi_shift"]) - p)
    if plan.grows("mix"):
        d = d + g["mix"] * (_power(lp, lr, plan.param("mix"), g["mix_shift"]) - p)
    if plan.grows("bkl"):
        inside = _in_top(z[1], g["top_value"], g["top_index"])
        outside = weighted(p, g["bkl_ratio"].expand_as(p))
        d = d + g["bkl"] * (p - torch.where(inside, r, outside))
    y, live = targets_of(call)
    here = live & (y >= 0) & (y < call.V)
    at = torch.where(here, g["e"][:, 0], 0.0)
    d = d.scatter_add(1, torch.where(here, y, 0)[:, None], at[:, None])
    if plan.grows("xent"):
        assert call.values is not None and call.values_index is not None
        q = _take(call, call.values).to(d.dtype) * g["teach"]
        d = d.scatter_add(1, _take(call, call.values_index), q)
    return torch.where(live[:, None], d, 0.0)
