"""Numbers per row: ranges to sums, sums to statistics, gradients of statistics to coefficients.

Everything here is float64 on tensors of M rows, a few megabytes beside the products. What a
statistic is, and how it pulls on the logits, stands here and in csrc/numerics/finish.h (the same in
C++), and nowhere else. Names and layouts: prefkern.backends.tables.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import tables
from ..contract import Folded, HeadCall, written

Sums = dict[str, Tensor]  # name -> [M] float64


def safe(m: Tensor) -> Tensor:
    """The maximum to subtract: 0 where there is nothing but -inf."""
    return torch.where(m == -math.inf, 0.0, m)


def weighted(p: Tensor, x: Tensor) -> Tensor:
    """p * x with 0 * anything = 0."""
    return torch.where(p == 0, 0.0, p * x)


class _Normaliser:
    """log-sum-exp of a row in two parts, and how its ranges [C, M] move to the row's maximum."""

    def __init__(self, range_max: Tensor, range_sum: Tensor) -> None:
        self.max = range_max.amax(0)
        self.shift = safe(range_max) - safe(self.max)
        self.factor = torch.exp(torch.where(range_max == -math.inf, -math.inf, self.shift))
        self.mass = range_sum
        self.sum = weighted(self.factor, range_sum).sum(0)


def merge(call: HeadCall, fields: Tensor, starts: Tensor, rounded: bool) -> Tensor:
    """[FIELDS, C, M] -> [FIELDS, M]: a sum of e^(z-m) moves to a new maximum m' by the factor
    e^(m-m'), and one that also carries (z-m) picks up (m-m') times the plain sum."""
    names = written(call.plan, rounded)
    f = {name: fields[tables.FIELDS.index(name)].double() for name in names}
    pol = _Normaliser(f["max"], f["sum"])
    s: Sums = {"max": pol.max, "sum": pol.sum}
    if rounded:
        both = _Normaliser(f["round_max"], f["round_sum"])
        s["round_max"], s["round_sum"] = both.max, both.sum
    if "x" in f:
        s["x"] = weighted(pol.factor, f["x"] + weighted(pol.mass, pol.shift)).sum(0)
    if "sq" in f:
        s["sq"] = weighted(pol.factor * pol.factor, f["sq"]).sum(0)
    for name in ("z_sum", "z_count"):
        if name in f:
            s[name] = f[name].sum(0)
    if "top" in f:
        # the first range that holds the maximum, then its first column
        column = f["top"] + starts.double()[:, None]
        s["top"] = torch.where(f["max"] == pol.max, column, math.inf).amin(0)
    if "ref_max" in f:
        ref = _Normaliser(f["ref_max"], f["ref_sum"])
        s["ref_max"], s["ref_sum"] = ref.max, ref.sum
        gap = ref.shift - pol.shift  # what a sum that carries (xr - x) picks up
        if "ref_cross" in f:
            moved = f["ref_cross"] + weighted(ref.mass, gap)
            s["ref_cross"] = weighted(ref.factor, moved).sum(0)
        if "pol_cross" in f:
            moved = f["pol_cross"] - weighted(pol.mass, gap)
            s["pol_cross"] = weighted(pol.factor, moved).sum(0)
        for name in ("alpha", "renyi", "mix"):
            if f"{name}_max" in f:
                raised = f[f"{name}_max"] + pol.shift + call.plan.param(name) * gap
                blend = _Normaliser(raised, f[f"{name}_sum"])
                s[f"{name}_max"], s[f"{name}_sum"] = blend.max, blend.sum
        if "aux_max" in f:
            aux = _Normaliser(f["aux_max"], f["aux_sum"])
            s["aux_max"], s["aux_sum"] = aux.max, aux.sum
            moved = f["adv"] + weighted(pol.mass, aux.shift - ref.shift)
            s["adv"] = weighted(pol.factor, moved).sum(0)
    if "adv" in f and "adv" not in s:
        s["adv"] = weighted(pol.factor, f["adv"]).sum(0)
    out = fields.new_zeros((len(tables.FIELDS), fields.shape[2]), dtype=torch.float64)
    for name, value in s.items():
        out[tables.FIELDS.index(name)] = value
    return out


def named(call: HeadCall, folded: Folded, second: Tensor | None = None) -> Sums:
    """The sums of a fold by name, with both normalisers."""
    s: Sums = {n: folded.sums[tables.FIELDS.index(n)] for n in written(call.plan, folded.rounded)}
    s |= dict(zip(tables.AT, folded.at, strict=True))
    for prefix in ("", "ref_", "aux_", "round_"):
        if f"{prefix}sum" in s:
            s[f"{prefix}lse"] = safe(s[f"{prefix}max"]) + s[f"{prefix}sum"].log()
    if second is not None:
        s |= dict(zip(tables.SECOND, second, strict=True))
    return s


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float64 x as a high and a low part in `dtype`; the low part of an infinity or NaN is 0."""
    high = x.to(dtype)
    low = torch.where(x.isfinite(), x - high.double(), 0.0)
    return high, low.to(dtype)


def norms(call: HeadCall, folded: Folded) -> Tensor:
    """[NORMS, M] of the second sweep."""
    s = named(call, folded)
    rows = s["lse"].new_zeros((len(tables.NORMS), call.M), dtype=call.fold_dtype)
    rows[0], rows[1] = split(s["lse"], call.fold_dtype)
    rows[2], rows[3] = split(s["ref_lse"], call.fold_dtype)
    if folded.top is not None:
        rows[4:6] = folded.top[:, -1]
    return rows


def targets_of(call: HeadCall) -> tuple[Tensor, Tensor]:
    """(targets [M], rows that count [M] bool)."""
    y = call.targets if call.rows is None else call.targets.index_select(0, call.rows)
    return y, y != call.ignore_index


def finish(call: HeadCall, folded: Folded, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """(values [n, M] in the fold dtype, saved [SAVED, M] float64)."""
    s = named(call, folded, second)
    y, live = targets_of(call)
    s["target"] = y.double()
    bad = (y < 0) | (y >= call.total)
    if call.plan.has("xent"):
        assert call.values is not None
        q = call.values if call.rows is None else call.values.index_select(0, call.rows)
        s["teacher"] = q.double().sum(1)
    values = torch.stack([_statistic(call, stat.name, s) for stat in call.plan.stats])
    out = torch.where(bad, math.nan, values)
    kept = values.new_zeros((call.plan.saved_rows, call.M))
    for i, name in enumerate(tables.SAVED[: call.plan.saved_rows]):
        if (value := _saved(call, name, s, folded)) is not None:
            kept[i] = value
    out, kept = (torch.where(live, x, 0.0) for x in (out, kept))
    return out.to(call.fold_dtype), kept


def _saved(call: HeadCall, name: str, s: Sums, folded: Folded) -> Tensor | None:
    plan = call.plan
    if name == "lse":
        return s["round_lse"] if folded.rounded else s["lse"]
    if name == "jsd_kl":
        return s["kl_pol"] if plan.has("jsd") else None
    if name in ("tv_mean", "rest_ref", "rest_pol"):
        return s[name] if plan.has("tv" if name == "tv_mean" else "bkl") else None
    if name in ("top_value", "top_index"):
        return None if folded.top is None else folded.top[int(name == "top_index"), -1]
    if name == "mix_shift":
        return _log_overlap(s, "mix", plan.param("mix")) if plan.has("mix") else None
    return s.get(name)


def _log_overlap(s: Sums, name: str, a: float) -> Tensor:
    """log sum r^a p^(1-a); the maxima cancel, so that only sums of order 1 are left, and equal
    models give exactly 0."""
    log_s = s["sum"].log()
    blend = safe(s[f"{name}_max"]) + s[f"{name}_sum"].log()
    return (blend - log_s) - a * (s["ref_sum"].log() - log_s)


def _statistic(call: HeadCall, name: str, s: Sums) -> Tensor:
    """One statistic [M] from the sums of both sweeps."""
    plan = call.plan
    log_s, lse = s["sum"].log(), s["lse"]
    bad = lse - lse  # 0, or NaN for a row with a NaN or +inf logit
    x = s["zy"] - safe(s["max"])  # both are logits of the row: exact where it matters
    if name == "logp":
        return x - log_s
    if name == "lse":
        return lse
    if name == "zy":
        return s["zy"] + bad
    if name == "ent":
        return log_s - s["x"] / s["sum"]
    if name == "col":
        return s["sq"].log() - 2.0 * log_s
    if name == "top1":
        return (s["top"] == s["target"]).double() + bad
    if name == "zmean":
        return s["z_sum"] / s["z_count"].clamp(min=1.0) + bad
    if name == "xent":
        return s["taught"] - s["teacher"] * lse
    if name == "ev":
        third = s["ref_sum"].log() - s["aux_sum"].log() if plan.ev == "aux" else 0.0
        return s["adv"] / s["sum"] + third
    log_r = s["ref_sum"].log()
    xr = s["ref_zy"] - safe(s["ref_max"])
    if name == "ref_logp":
        return xr - log_r
    if name == "ref_lse":
        return s["ref_lse"]
    if name == "fkl":
        return s["ref_cross"] / s["ref_sum"] + (log_s - log_r)
    if name == "rkl":
        return s["pol_cross"] / s["sum"] + (log_r - log_s)
    if name == "alpha":
        a = plan.param("alpha")
        return -torch.expm1(_log_overlap(s, "alpha", a)) / (a * (1.0 - a))
    if name == "renyi":
        a = plan.param("renyi")
        return _log_overlap(s, "renyi", a) / (a - 1.0)
    if name == "mix":
        b = plan.param("mix")
        none = (x == -math.inf) | (xr == -math.inf)
        u = x if b == 0 else xr if b == 1 else torch.where(none, -math.inf, x + b * (xr - x))
        return (u - safe(s["mix_max"])) - s["mix_sum"].log() + bad + (log_r - log_r)
    if name == "jsd":
        b = plan.param("jsd")
        return b * s["kl_ref"] + (1.0 - b) * s["kl_pol"]
    if name == "tv":
        return 0.5 * s["tv"]
    if name == "bkl":
        gap = s["rest_ref"].log() - s["rest_pol"].log()
        return s["top_kl"] + weighted(s["rest_ref"], gap)
    raise AssertionError(f"no rule for statistic {name!r}")


def pull(call: HeadCall, d_out: Tensor, out: Tensor, saved: Tensor) -> Tensor:
    """[COEFFICIENTS, M]: what multiplies what in the logit gradient, with dz/dx's constant
    factor. Rows that do not count pull with 0, whatever their upstream numbers are."""
    plan, live = call.plan, targets_of(call)[1]
    kept = dict(zip(tables.SAVED, saved, strict=False))
    g: Sums = {name: kept[name] for name in ("lse", "ref_lse", "aux_lse") if name in kept}
    factor = call.policy.scale / call.policy.temperature

    def add(name: str, x: Tensor) -> None:
        g[name] = g[name] + x if name in g else x

    for i, stat in enumerate(plan.stats):
        if not plan.grows(stat.name):
            continue
        name, param, c = stat.name, stat.param or 0.0, d_out[i].double() * factor
        value = out[i].double()
        if name in ("logp", "mix"):
            add("e", (1.0 - param) * c)
            add("a0", (param - 1.0) * c)
        if name == "lse":
            add("a0", c)
        elif name == "zy":
            add("e", c)
        elif name == "ent":
            g["ent"], g["ent_value"] = -c, value
        elif name == "col":
            g["col_value"] = value.exp()
            g["col"] = 2.0 * c / g["col_value"]
        elif name == "xent":
            g["teach"] = c
            add("a0", -c * kept["teacher"])
        elif name == "fkl":
            g["fkl"] = c
        elif name in ("rkl", "ev"):
            g[name], g[f"{name}_value"] = c, value
        elif name == "alpha":
            add("a0", -c * (1.0 - param) * value)  # (S_a - 1) / a
            g["alpha"] = -c / param
        elif name == "renyi":
            g["renyi"], g["renyi_shift"] = -c, (param - 1.0) * value
        elif name == "mix":
            g["mix"], g["mix_shift"] = (param - 1.0) * c, kept["mix_shift"]
        elif name == "jsd":
            g["jsd"], g["jsd_kl"] = (1.0 - param) * c, kept["jsd_kl"]
        elif name == "tv":
            g["tv"], g["tv_mean"] = 0.5 * c, kept["tv_mean"]
        elif name == "bkl":
            rest = kept["rest_pol"]
            g["bkl"] = c
            g["bkl_ratio"] = torch.where(rest > 0, kept["rest_ref"] / rest, 0.0)
            g["top_value"], g["top_index"] = kept["top_value"], kept["top_index"]
    rows = d_out.new_zeros((len(tables.COEFFICIENTS), call.M), dtype=call.fold_dtype)
    for name, x in g.items():
        place = tables.COEFFICIENTS.index(name)
        if f"{name}_low" in tables.COEFFICIENTS:
            rows[place], rows[place + 1] = split(x, call.fold_dtype)
        else:
            rows[place] = x
    return torch.where(live, rows, 0.0)
