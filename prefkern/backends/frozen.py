"""A frozen head: the forward keeps sums of head rows, and the backward is a few row scalings.

The gradient of a statistic with respect to a hidden state is sum_v (d stat / dx_v) W_v, which for
logp, lse, zy, ent, fkl and rkl is made of the target's row of W and up to four sums of rows:

    mass: sum p W    log: sum p log p W    gap: sum (p - r) W    cross: sum p (log p - log r) W

(each term times dz/dx's variable part). A fold gathers them relative to its maxima; `normalise`
turns them into these; `gradient` puts them together with the coefficients that every other backward
uses. Elementwise on [M, D]: no product with the vocabulary. Shapes: M computed rows, D hidden size,
r rank of the low-rank terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import tables
from .contract import Gradients, HeadCall, Model


def normalise(call: HeadCall, factors: Tensor, own: Tensor, sums: Tensor) -> Tensor:
    """Factors [f, M, D + r] relative to maxima -> the sums above, in place. `own`: the sums
    [FIELDS, M] the factors were gathered with; `sums`: those of the whole vocabulary (the same,
    unless a rank holds a part of it)."""
    f = dict(zip(call.plan.factors, factors.unbind(0), strict=True))
    shift, dtype = _shift(call, own, sums, ""), factors.dtype
    scale = shift.exp()
    if "gap" in f or "cross" in f:  # differences in float64: they are 0 where the models are equal
        ref_shift = _shift(call, own, sums, "ref_")
        if "gap" in f:
            ref_scale = ref_shift.exp()
            f["gap"].mul_(ref_scale.to(dtype)).addcmul_(f["mass"], (scale - ref_scale).to(dtype))
        if "cross" in f:
            f["cross"].addcmul_(f["mass"], (shift - ref_shift).to(dtype)).mul_(scale.to(dtype))
    f["mass"].mul_(scale.to(dtype))
    if "log" in f:
        f["log"].mul_(scale.to(dtype)).addcmul_(f["mass"], shift.to(dtype))
    return factors


def _shift(call: HeadCall, own: Tensor, sums: Tensor, prefix: str) -> Tensor:
    """[M, 1] float64: what makes a log-probability of x, the logit less the maximum in `own`."""
    at, total = (tables.FIELDS.index(f"{prefix}{name}") for name in ("max", "sum"))
    shift = -sums[total].log()
    if own is not sums:
        shift = shift + (_safe(own[at]) - _safe(sums[at]))
    if call.rows is None:  # rows that no fold computed have no sums
        shift = torch.where(call.targets != call.ignore_index, shift, 0.0)
    return shift[:, None]


def _safe(m: Tensor) -> Tensor:
    return torch.where(m == -torch.inf, 0.0, m)


def gradient(
    call: HeadCall, coefficients: Tensor, factors: Tensor, saved: Tensor, needed: frozenset[str]
) -> Gradients:
    """dH [N, D] (and d low_in [N, r]) from normalised factors [factors, M, D + r]."""
    policy, plan = call.policy, call.plan
    assert policy.hidden is not None and policy.weight is not None

    def c(name: str) -> Tensor:
        return coefficients[tables.COEFFICIENTS.index(name)]

    f = dict(zip(plan.factors, factors.unbind(0), strict=True))
    a0 = c("a0")
    if plan.grows("ent"):
        a0 = a0 + c("ent") * c("ent_value")
    if plan.grows("rkl"):
        a0 = a0 - c("rkl") * c("rkl_value")
    d = f["mass"] * a0[:, None]
    for name, of in (("log", "ent"), ("gap", "fkl"), ("cross", "rkl")):
        if name in f:
            d.addcmul_(f[name], c(of)[:, None])
    targets = call.targets if call.rows is None else call.targets.index_select(0, call.rows)
    live = targets != call.ignore_index
    if plan.grows("logp") or plan.grows("zy"):
        here = (targets >= 0) & (targets < call.V)
        at_target = _head_rows(policy, torch.where(here, targets, 0), call).to(d.dtype)
        e = torch.where(here, c("e"), 0.0)
        if policy.softcap != 0.0:
            zy = saved[tables.SAVED.index("zy")].to(d.dtype)
            e = e * (1.0 - (zy * (policy.temperature / policy.softcap)) ** 2)
        d.addcmul_(at_target, e[:, None])
    d = torch.where(live[:, None], d, 0.0)
    if call.rows is not None:
        d = d.new_zeros((call.N, d.shape[1])).index_copy_(0, call.rows, d)
    d = d.to(call.working)
    depth = policy.hidden.shape[1]
    found = {}
    if "hidden" in needed:
        found["hidden"] = d[:, :depth]
    if "low_in" in needed:
        found["low_in"] = d[:, depth:]
    return Gradients(**{k: v.contiguous() for k, v in found.items()})


def _head_rows(model: Model, index: Tensor, call: HeadCall) -> Tensor:
    """[M, D + r] rows of the head in the working dtype."""
    assert model.weight is not None
    rows = model.weight.index_select(0, index).to(call.working)
    if model.low_out is None:
        return rows
    return torch.cat([rows, model.low_out.index_select(0, index).to(call.working)], 1)
