"""The gradient of a call with respect to its logits, from the coefficients of every row.

Shapes: M computed rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tables
from ..contract import HeadCall
from .finish import targets_of, weighted
from .logits import advantage, blend, in_top, take_rows


def log_mixture_ratio(d: Tensor, b: float) -> Tensor:
    """log of (b r + (1-b) p) / p from d = log r - log p, |d| <= 80; d = 0 gives exactly 0."""
    return torch.log1p(b * torch.expm1(d))


def _power(x: Tensor, xr: Tensor, a: float, shift: Tensor) -> Tensor:
    """e^(x + a (xr - x) - shift), 0 where a term with weight is -inf."""
    return (blend(x, xr, a) - shift).exp()


def logit_gradient(call: HeadCall, coefficients: Tensor, z: list[Tensor]) -> Tensor:
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
        inside = in_top(z[1], g["top_value"], g["top_index"])
        outside = weighted(p, g["bkl_ratio"].expand_as(p))
        d = d + g["bkl"] * (p - torch.where(inside, r, outside))
    y, live = targets_of(call)
    here = live & (y >= 0) & (y < call.V)
    at = torch.where(here, g["e"][:, 0], 0.0)
    d = d.scatter_add(1, torch.where(here, y, 0)[:, None], at[:, None])
    if plan.grows("xent"):
        assert call.values is not None and call.values_index is not None
        q = take_rows(call, call.values).to(d.dtype) * g["teach"]
        d = d.scatter_add(1, take_rows(call, call.values_index), q)
    return torch.where(live[:, None], d, 0.0)
