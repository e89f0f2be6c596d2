"""Statistics of full logits and their logit gradients, one formula per statistic.

z [M, V] are the policy's logits, zr [M, V] the reference's (None for one model), y [M] targets,
all rows scored, computed in fp32 (fp64 for fp64 input). p = softmax(z), r = softmax(zr).
An entry with logit -inf has p = 0, and 0 times anything is 0 in every sum.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor


class Model(NamedTuple):
    """log-probabilities and probabilities of one model."""

    z: Tensor  # [M, V]
    lse: Tensor  # [M]
    logprob: Tensor  # [M, V]
    prob: Tensor  # [M, V]


class Inputs(NamedTuple):
    """Everything the statistics of M scored rows are made of."""

    y: Tensor  # [M]
    policy: Model
    ref: Model | None = None
    aux: Model | None = None
    values: Tensor | None = None  # [V], or [M, k] with values_index
    values_index: Tensor | None = None  # [M, k]
    top_logits: Tensor | None = None  # [M, V] where bkl picks its top set; None: ref.z


def model(z: Tensor) -> Model:
    lse = torch.logsumexp(z, -1)
    logprob = z - lse[:, None]
    return Model(z, lse, logprob, logprob.exp())


def pick(x: Tensor, y: Tensor) -> Tensor:
    """x[i, y_i] [M]."""
    return x.gather(-1, y[:, None]).squeeze(-1)


def weighted(p: Tensor, x: Tensor) -> Tensor:
    """p * x with 0 * anything = 0."""
    return torch.where(p == 0, 0.0, p * x)


def split(stat: str) -> tuple[str, float | None]:
    name, _, param = stat.partition(":")
    return name, float(param) if param else None


def _operands(stat: str, s: Inputs) -> tuple[str, float, Model, Model]:
    """(name, parameter, policy, reference); the formulas that read a parameter or a reference are
    asked for only where it is there, so both are typed as present."""
    name, param = split(stat)
    return name, cast(float, param), s.policy, cast(Model, s.ref)


def advantage(s: Inputs) -> Tensor:
    """A [M, V] of the statistic ev: given values, sparse values, or log r_aux - log r."""
    if s.aux is not None:
        assert s.ref is not None
        return s.aux.logprob - s.ref.logprob
    assert s.values is not None
    if s.values_index is None:
        return s.values.to(s.policy.z.dtype).expand_as(s.policy.z)
    dense = torch.zeros_like(s.policy.z)
    return dense.scatter_add(-1, s.values_index, s.values.to(dense.dtype))


def mixture_logprob(b: float, p: Model, r: Model) -> Tensor:
    """log(b r + (1-b) p) [M, V]; equal to log p bit for bit where p = r."""
    d = r.logprob - p.logprob
    near = p.logprob + torch.log1p(b * torch.expm1(d.clamp(-1, 1)))
    far = torch.logaddexp(math.log(b) + r.logprob, math.log1p(-b) + p.logprob)
    return torch.where(d.abs() < 1, near, far)


def blend(b: float, p: Model, r: Model) -> Tensor:
    """(1-b) z + b z_ref [M, V], -inf wherever a term with weight > 0 is -inf."""
    if b == 0:
        return p.z
    return r.z if b == 1 else (1 - b) * p.z + b * r.z


def overlap(a: float, p: Model, r: Model) -> Tensor:
    """log S_a = log sum_v r^a p^(1-a) [M]; exactly 0 where p = r."""
    shift = weighted(r.prob, torch.expm1((1 - a) * (p.logprob - r.logprob))).sum(-1)
    direct = torch.logsumexp(a * r.logprob + (1 - a) * p.logprob, -1)
    return torch.where(shift.abs() < 0.5, torch.log1p(shift), direct)


def top_set(k: int, s: Inputs) -> Tensor:
    """Mask [M, V] of the k largest reference logits, ties to the lower index.

    Picked from logits as the backward reads them, so that forward and backward agree on the set.
    """
    if s.top_logits is None:
        assert s.ref is not None
        z = s.ref.z
    else:
        z = s.top_logits
    order = torch.sort(z, dim=-1, descending=True, stable=True).indices[:, : min(k, z.shape[-1])]
    return torch.zeros_like(z, dtype=torch.bool).scatter(-1, order, True)


def log_rest(top: Tensor, m: Model) -> Tensor:
    """log of the probability outside the top set [M]; -inf when nothing is left."""
    return torch.logsumexp(m.logprob.masked_fill(top, -math.inf), -1)


def value(stat: str, s: Inputs) -> Tensor:
    """One statistic [M]."""
    name, x, p, r = _operands(stat, s)
    y = s.y
    match name:
        case "logp":
            return pick(p.z, y) - p.lse
        case "lse":
            return p.lse
        case "zy":
            return pick(p.z, y)
        case "ent":
            return -weighted(p.prob, p.logprob).sum(-1)
        case "col":
            return torch.logsumexp(2 * p.logprob, -1)
        case "top1":
            vocab = torch.arange(p.z.shape[-1], device=y.device)
            first = torch.where(p.z == p.z.amax(-1, keepdim=True), vocab, p.z.shape[-1]).amin(-1)
            return (first == y).to(p.z.dtype)
        case "zmean":
            finite = p.z != -math.inf
            return torch.where(finite, p.z, 0.0).sum(-1) / finite.sum(-1).clamp(min=1)
        case "ref_logp":
            return pick(r.z, y) - r.lse
        case "ref_lse":
            return r.lse
        case "fkl":
            return weighted(r.prob, r.logprob - p.logprob).sum(-1)
        case "rkl":
            return weighted(p.prob, p.logprob - r.logprob).sum(-1)
        case "jsd":
            lm = mixture_logprob(x, p, r)
            to_ref = weighted(r.prob, r.logprob - lm).sum(-1)
            return x * to_ref + (1 - x) * weighted(p.prob, p.logprob - lm).sum(-1)
        case "alpha":
            return -torch.expm1(overlap(x, p, r)) / (x * (1 - x))
        case "renyi":
            return overlap(x, p, r) / (x - 1)
        case "tv":
            return 0.5 * (p.prob - r.prob).abs().sum(-1)
        case "bkl":
            top = top_set(int(x), s)
            inside = weighted(r.prob.masked_fill(~top, 0.0), r.logprob - p.logprob).sum(-1)
            rest_r, rest_p = log_rest(top, r), log_rest(top, p)
            return inside + weighted(rest_r.exp(), rest_r - rest_p)
        case "mix":
            u = blend(x, p, r)
            return pick(u, y) - torch.logsumexp(u, -1)
        case "ev":
            return weighted(p.prob, advantage(s)).sum(-1)
    raise AssertionError(f"no formula for statistic {stat!r}")


def logit_gradient(stat: str, c: Tensor, s: Inputs, out: Tensor) -> Tensor | None:
    """c * d stat / dz [M, V] for upstream numbers c [M] and the statistic's value out [M]; None for
    statistics without a gradient."""
    name, x, p, r = _operands(stat, s)
    c, out = c[:, None], out[:, None]
    onehot = torch.zeros_like(p.z).scatter_(-1, s.y[:, None], 1.0)
    match name:
        case "logp":
            return c * (onehot - p.prob)
        case "lse":
            return c * p.prob
        case "zy":
            return c * onehot
        case "ent":
            return -c * weighted(p.prob, p.logprob + out)
        case "col":
            return 2 * c * (weighted((2 * p.logprob - out).exp(), torch.ones_like(p.z)) - p.prob)
        case "fkl":
            return c * (p.prob - r.prob)
        case "rkl":
            return c * weighted(p.prob, p.logprob - r.logprob - out)
        case "jsd":
            lm = mixture_logprob(x, p, r)
            kl = weighted(p.prob, p.logprob - lm).sum(-1, keepdim=True)
            return (1 - x) * c * weighted(p.prob, p.logprob - lm - kl)
        case "alpha":
            power = (x * r.logprob + (1 - x) * p.logprob).exp()
            return c / x * (p.prob * power.sum(-1, keepdim=True) - power)
        case "renyi":
            power = x * r.logprob + (1 - x) * p.logprob
            return c * (p.prob - torch.softmax(power, -1))
        case "tv":
            sign = torch.sign(p.prob - r.prob)
            mean = (p.prob * sign).sum(-1, keepdim=True)
            return 0.5 * c * p.prob * (sign - mean)
        case "bkl":
            top = top_set(int(x), s)
            ratio = (log_rest(top, r) - log_rest(top, p))[:, None].exp()
            outside = weighted(p.prob, ratio.expand_as(p.prob))
            return c * (p.prob - torch.where(top, r.prob, outside))
        case "mix":
            return (1 - x) * c * (onehot - torch.softmax(blend(x, p, r), -1))
        case "ev":
            return c * weighted(p.prob, advantage(s) - out)
    return None
