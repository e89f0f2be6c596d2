"""Arithmetic on one number per row: chunks to sums, sums to statistics, statistics to coefficients.

Everything here is fp64 on tensors of M rows (the chunk fields are [C, M] once), a few megabytes
beside the tiles. Formulas: csrc/numerics (online.h, finish.h, gradient.h) has the same in C++.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..contract import SAVED_ROWS
from .epilogue import COEFFICIENTS, NORMS, SECOND_FIELDS, Call

# Rows of `saved` of a two-model call; one-model calls keep the first alone. `lse_low` shares the
# row of the third head, which logits_logps (the only user of the low part) does not have.
SAVED = (
    "lse", "ref_lse", "aux_lse", "jsd_kl", "tv_mean", "rest_ref", "rest_pol", "top_value",
    "top_index", "mix_lse",
)  # fmt: skip
assert len(SAVED) == SAVED_ROWS
LSE_LOW = SAVED.index("aux_lse")
BLOCKED = 1 << 22  # chunk fields merged at a time, so that fp64 copies stay below 0.3 GB


def safe(m: Tensor) -> Tensor:
    """The maximum to subtract: 0 where there is nothing but -inf."""
    return torch.where(m == -math.inf, 0.0, m)


def weighted(p: Tensor, x: Tensor) -> Tensor:
    """p * x with 0 * anything = 0."""
    return torch.where(p == 0, 0.0, p * x)


class Normaliser:
    """log-sum-exp of a row in two parts, and how its chunks [C, M] move to the row's maximum."""

    def __init__(self, chunk_max: Tensor, chunk_sum: Tensor) -> None:
        self.max = chunk_max.amax(0)
        self.shift = safe(chunk_max) - safe(self.max)
        self.factor = torch.exp(torch.where(chunk_max == -math.inf, -math.inf, self.shift))
        self.mass = chunk_sum
        self.sum = weighted(self.factor, chunk_sum).sum(0)

    @property
    def log_sum(self) -> Tensor:
        return self.sum.log()

    @property
    def value(self) -> Tensor:
        return safe(self.max) + self.log_sum


Sums = dict[str, Tensor]  # name -> [M] fp64


def merge(call: Call, fields: Tensor, starts: Tensor) -> Sums:
    """Row sums from fields [F, C, M]; starts [C] is the first column of every chunk."""
    m = fields.shape[2]
    step = max(1, BLOCKED // max(1, fields.shape[1] * fields.shape[0]))
    parts = [_merge(call, fields[:, :, i : i + step], starts) for i in range(0, m, step)]
    if len(parts) == 1:
        return parts[0]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]} if parts else {}


def _merge(call: Call, fields: Tensor, starts: Tensor) -> Sums:
    f = {name: fields[i].double() for i, name in enumerate(call.fields) if _written(call, name)}
    pol = Normaliser(f["max"], f["sum"])
    s: Sums = {"max": pol.max, "sum": pol.sum, "lse": pol.value}
    ref = aux = None
    if call.ref is not None:
        ref = Normaliser(f["ref_max"], f["ref_sum"])
        s |= {"ref_max": ref.max, "ref_sum": ref.sum, "ref_lse": ref.value}
        # a sum that carries (xr - x) picks up the difference of the two shifts
        gap = ref.shift - pol.shift
        s["ref_cross"] = weighted(ref.factor, f["ref_cross"] + weighted(ref.mass, gap)).sum(0)
        s["pol_cross"] = weighted(pol.factor, f["pol_cross"] - weighted(pol.mass, gap)).sum(0)
    for name in ("", "ref_", "aux_"):
        if f"{name}round_max" in f:
            rounded = Normaliser(f[f"{name}round_max"], f[f"{name}round_sum"])
            s[f"{name}round_lse"] = rounded.value
    if call.small:
        return s
    s["x"] = weighted(pol.factor, f["x"] + weighted(pol.mass, pol.shift)).sum(0)
    s["sq"] = weighted(pol.factor * pol.factor, f["sq"]).sum(0)
    s["z_sum"], s["z_count"] = f["z_sum"].sum(0), f["z_count"].sum(0)
    # the first chunk that holds the maximum, then its first column
    column = f["top"] + starts[:, None]
    s["top"] = torch.where(f["max"] == pol.max, column, math.inf).amin(0)
    if ref is None:
        return s
    for name in ("alpha", "renyi", "mix"):
        moved = f[f"{name}_max"] + pol.shift + call.param(name) * gap
        blend = Normaliser(moved, f[f"{name}_sum"])
        s[f"{name}_max"], s[f"{name}_sum"] = blend.max, blend.sum
    s["plain_lse"] = Normaliser(f["plain_max"], f["plain_sum"]).value
    if call.ev == "aux":
        aux = Normaliser(f["aux_max"], f["aux_sum"])
        s["aux_sum"], s["aux_lse"] = aux.sum, aux.value
        moved = weighted(pol.mass, aux.shift - ref.shift)
        s["adv"] = weighted(pol.factor, f["adv"] + moved).sum(0)
    elif call.ev == "values":
        s["adv"] = weighted(pol.factor, f["adv"]).sum(0)
    return s


def _written(call: Call, name: str) -> bool:
    """Fields that the fold leaves alone hold no numbers."""
    if (name.startswith("aux_") and call.ev != "aux") or (name == "adv" and not call.ev):
        return False
    return "round_" not in name or (call.wide and call.rounds)


def _log_overlap(s: Sums, name: str, a: float) -> Tensor:
    """log sum r^a p^(1-a); the maxima cancel, so that only sums of order 1 are left, and equal
    models give exactly 0."""
    log_s = s["sum"].log()
    blend = safe(s[f"{name}_max"]) + s[f"{name}_sum"].log()
    return (blend - log_s) - a * (s["ref_sum"].log() - log_s)


def statistic(call: Call, name: str, s: Sums) -> Tensor:
    """One statistic [M] fp64 from the sums of both sweeps."""
    log_s = s["sum"].log()
    lse = s["lse"]
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
    if name == "ev" and call.ref is not None:
        third = s["ref_sum"].log() - s["aux_sum"].log() if call.ev == "aux" else 0.0
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
        a = call.param("alpha")
        return -torch.expm1(_log_overlap(s, "alpha", a)) / (a * (1.0 - a))
    if name == "renyi":
        a = call.param("renyi")
        return _log_overlap(s, "renyi", a) / (a - 1.0)
    if name == "mix":
        b = call.param("mix")
        none = (x == -math.inf) | (xr == -math.inf)
        u = x if b == 0 else xr if b == 1 else torch.where(none, -math.inf, x + b * (xr - x))
        return (u - safe(s["mix_max"])) - s["mix_sum"].log() + bad + (log_r - log_r)
    if name == "jsd":
        b = call.param("jsd")
        return b * s["kl_ref"] + (1.0 - b) * s["kl_pol"]
    if name == "tv":
        return 0.5 * s["tv"]
    if name == "bkl":
        gap = s["rest_ref"].log() - s["rest_pol"].log()
        return s["top_kl"] + weighted(s["rest_ref"], gap)
    raise AssertionError(f"no rule for statistic {name!r}")


def add_second(s: Sums, fields: Tensor) -> None:
    """Adds the sums of the second sweep, fields [7, C, M]."""
    for name, x in zip(SECOND_FIELDS, fields, strict=True):
        s[name] = x.double().sum(0)


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp64 x as a high and a low part in `dtype`; the low part of an infinity or NaN is 0."""
    high = x.to(dtype)
    low = torch.where(x.isfinite(), x - high.double(), 0.0)
    return high, low.to(dtype)


def norms(call: Call, s: Sums) -> Tensor:
    """[NORMS, M] of the second sweep: normalisers of the logits it reads."""
    rows = s["lse"].new_zeros((len(NORMS), s["lse"].shape[0]), dtype=call.fold_dtype)
    rows[0], rows[1] = split(s["lse"], call.fold_dtype)
    rows[2], rows[3] = split(s["ref_lse"], call.fold_dtype)
    if "top_value" in s:
        rows[4], rows[5] = s["top_value"], s["top_index"]
    return rows


def saved(call: Call, s: Sums, *, low: bool = False) -> Tensor:
    """[1 | 10, M] in the fold dtype: normalisers of the logits the backward reads, and values of
    the second sweep. `low`: also the low part of lse (logits_logps)."""
    dtype = call.fold_dtype
    lse = s.get("round_lse", s["lse"])
    if call.ref is None and not low:
        return lse[None].to(dtype)
    rows = lse.new_zeros((len(SAVED), lse.shape[0]), dtype=dtype)
    rows[0] = lse
    if low:
        rows[LSE_LOW] = split(lse, dtype)[1]
    found = dict(s)
    found["ref_lse"] = s.get("ref_round_lse", s.get("ref_lse", lse))
    found["aux_lse"] = s.get("aux_round_lse", s.get("aux_lse", lse))
    found["mix_lse"], found["jsd_kl"] = s.get("plain_lse", lse), s.get("kl_pol", lse)
    wanted = {
        "ref_lse": call.ref is not None, "aux_lse": call.ev == "aux", "jsd_kl": call.has("jsd"),
        "tv_mean": call.has("tv"), "mix_lse": call.has("mix"), "rest_ref": call.has("bkl"),
        "rest_pol": call.has("bkl"), "top_value": call.has("bkl"), "top_index": call.has("bkl"),
    }  # fmt: skip
    for name, there in wanted.items():
        if there:
            rows[SAVED.index(name)] = found[name]
    return rows


def coefficients(
    call: Call,
    d_out: Tensor,  # [n, M]
    out: Tensor,  # [n, M]
    kept: Tensor,  # [1 | 10, M], as `saved` made it
    *,
    low: bool = False,
) -> Tensor:  # [COEFFICIENTS, M]
    """What multiplies what in the logit gradient, with dz/dx's constant factor."""
    m = d_out.shape[1]
    g: dict[str, Tensor] = {"lse": kept[0].double()}
    if low:
        g["lse"] = kept[0].double() + kept[LSE_LOW].double()
    scale = call.policy.scale / call.policy.temperature
    up = {s.name: d_out[i].double() * scale for i, s in enumerate(call.stats)}
    value = {s.name: out[i].double() for i, s in enumerate(call.stats)}
    extra = {name: kept[i].double() for i, name in enumerate(SAVED) if i < kept.shape[0]}
    zero = d_out.new_zeros(m, dtype=torch.float64)
    e, a0 = zero, zero
    for name, c in up.items():
        param = call.param(name)
        if name in ("logp", "mix"):
            e, a0 = e + (1.0 - param) * c, a0 - (1.0 - param) * c
        elif name == "lse":
            a0 = a0 + c
        elif name == "zy":
            e = e + c
        elif name == "ent":
            g["ent"], g["ent_value"] = -c, value[name]
        elif name == "col":
            g["col_value"] = value[name].exp()
            g["col"] = 2.0 * c / g["col_value"]
        elif name == "fkl":
            g["fkl"] = c
        elif name == "rkl" or name == "ev":
            g[name], g[f"{name}_value"] = c, value[name]
        elif name == "alpha":
            a0 = a0 - c * (1.0 - param) * value[name]  # (S_a - 1) / a
            g["alpha"] = -c / param
        elif name == "renyi":
            g["renyi"], g["renyi_shift"] = -c, (param - 1.0) * value[name]
        elif name == "jsd":
            g["jsd"], g["jsd_kl"] = (1.0 - param) * c, extra["jsd_kl"]
        elif name == "tv":
            g["tv"], g["tv_mean"] = 0.5 * c, extra["tv_mean"]
        elif name == "bkl":
            rest = extra["rest_pol"]
            g["bkl"] = c
            g["bkl_ratio"] = torch.where(rest > 0, extra["rest_ref"] / rest, 0.0)
            g["top_value"], g["top_index"] = extra["top_value"], extra["top_index"]
        if name == "mix":
            g["mix"], g["mix_lse"] = -(1.0 - param) * c, extra["mix_lse"]
    g["e"], g["a0"] = e, a0
    if call.ref is not None:
        g["ref_lse"] = extra["ref_lse"]
    if call.ev == "aux":
        g["aux_lse"] = extra["aux_lse"]
    rows = d_out.new_zeros((len(COEFFICIENTS), m), dtype=call.fold_dtype)
    for name, x in g.items():
        i = COEFFICIENTS.index(name)
        if f"{name}_low" in COEFFICIENTS:
            rows[i], rows[i + 1] = split(x, call.fold_dtype)
        else:
            rows[i] = x
    return rows
