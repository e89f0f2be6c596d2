"""Float64 oracles of every statistic and its gradient, one row and one definition at a time.

Nothing here is imported from prefkern and nothing is shared between two statistics beyond
log_softmax, so that a mistake in the package cannot be repeated here by construction. Gradients are
the closed forms of single statistics; tests/test_oracles.py compares them with central differences.
An oracle is never edited to agree with an implementation.

Shapes: N rows, V vocabulary, D hidden size, S sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

NO_GRADIENT = ("top1", "zmean", "ref_logp", "ref_lse")


def as_f64(x) -> np.ndarray:
    """A float64 copy of a tensor or array; exact for every narrower dtype."""
    if hasattr(x, "detach"):
        return x.detach().double().cpu().numpy().copy()
    return np.array(x, dtype=np.float64)


def log_softmax(z: np.ndarray) -> np.ndarray:  # [V] -> [V]
    top = z.max()
    return z - (top + math.log(np.exp(z - top).sum()))


def logsumexp(z: np.ndarray) -> float:
    top = float(z.max())
    return top + math.log(float(np.exp(z - top).sum()))


def _weighted(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """p * x where 0 * anything = 0."""
    out = np.zeros_like(p)
    live = p > 0
    out[live] = p[live] * x[live]
    return out


def _minus(x: np.ndarray, y: np.ndarray, live: np.ndarray) -> np.ndarray:
    """x - y where `live`, else 0, so that -inf minus -inf is never formed."""
    out = np.zeros_like(x)
    out[live] = x[live] - y[live]
    return out


def _geometric(lp: np.ndarray, lr: np.ndarray, a: float) -> np.ndarray:
    """r^a p^(1-a), 0 where either is 0 (a strictly between 0 and 1)."""
    live = np.isfinite(lp) & np.isfinite(lr)
    out = np.zeros_like(lp)
    out[live] = np.exp(a * lr[live] + (1 - a) * lp[live])
    return out


def top_k(z: np.ndarray, k: int) -> np.ndarray:
    """Mask of the k largest entries, ties to the lower index."""
    order = np.lexsort((np.arange(z.size), -z))
    mask = np.zeros(z.size, dtype=bool)
    mask[order[: min(k, z.size)]] = True
    return mask


def row_statistic(
    stat: str,
    z: np.ndarray,  # [V]
    y: int,
    zr: np.ndarray | None = None,  # [V]
    values: np.ndarray | None = None,  # [V]
    rank_by: np.ndarray | None = None,  # [V] logits that choose bkl's top-k, default zr
) -> tuple[float, np.ndarray]:
    """Value of one statistic at one token and its gradient with respect to the logits [V]."""
    name, _, text = stat.partition(":")
    arg = float(text) if text else None
    lp = log_softmax(z)
    p = np.exp(lp)
    onehot = np.zeros_like(p)
    onehot[y] = 1.0
    none = np.zeros_like(p)
    if name == "logp":
        return float(lp[y]), onehot - p
    if name == "lse":
        return logsumexp(z), p
    if name == "zy":
        return float(z[y]), onehot
    if name == "ent":
        ent = -float(_weighted(p, lp).sum())
        return ent, -_weighted(p, lp + ent)
    if name == "col":
        mass = float((p * p).sum())
        return math.log(mass), 2 * p * (p - mass) / mass
    if name == "top1":
        return float(int(np.argmax(z)) == y), none
    if name == "zmean":
        return float(z[np.isfinite(z)].mean()), none
    if name == "ev":
        ev = float(_weighted(p, values).sum())
        return ev, _weighted(p, values - ev)
    lr = log_softmax(zr)
    r = np.exp(lr)
    if name == "ref_logp":
        return float(lr[y]), none
    if name == "ref_lse":
        return logsumexp(zr), none
    if name == "fkl":
        return float(_weighted(r, _minus(lr, lp, r > 0)).sum()), p - r
    if name == "rkl":
        gap = _minus(lp, lr, p > 0)
        rkl = float(_weighted(p, gap).sum())
        return rkl, _weighted(p, gap - rkl)
    if name == "jsd":
        mix = arg * r + (1 - arg) * p
        lmix = np.log(mix, out=np.full_like(mix, -np.inf), where=mix > 0)
        kl_r = float(_weighted(r, _minus(lr, lmix, r > 0)).sum())
        gap = _minus(lp, lmix, p > 0)
        kl_p = float(_weighted(p, gap).sum())
        return arg * kl_r + (1 - arg) * kl_p, (1 - arg) * _weighted(p, gap - kl_p)
    if name == "alpha":
        terms = _geometric(lp, lr, arg)
        mass = float(terms.sum())
        return (1 - mass) / (arg * (1 - arg)), (p * mass - terms) / arg
    if name == "renyi":
        terms = _geometric(lp, lr, arg)
        mass = float(terms.sum())
        return math.log(mass) / (arg - 1), p - terms / mass
    if name == "tv":
        sign = np.sign(p - r)
        return 0.5 * float(np.abs(p - r).sum()), 0.5 * p * (sign - float((p * sign).sum()))
    if name == "bkl":
        head = top_k(zr if rank_by is None else rank_by, int(arg))
        rest_r, rest_p = float(r[~head].sum()), float(p[~head].sum())
        live = head & (r > 0)
        value = float((r[live] * (lr[live] - lp[live])).sum())
        grad = p - np.where(head, r, 0.0)
        if rest_r > 0:
            value += rest_r * math.log(rest_r / rest_p)
            grad -= np.where(head, 0.0, p * rest_r / rest_p)
        return value, grad
    if name == "mix":
        with np.errstate(invalid="ignore"):
            blend = (1 - arg) * z + arg * zr
        lm = log_softmax(np.where(np.isneginf(z), z, blend))  # dead in both: dead
        return float(lm[y]), (1 - arg) * (onehot - np.exp(lm))
    raise AssertionError(f"the oracle knows no statistic {stat!r}")


def head_logits(hidden, weight, bias=None, scale=1.0, softcap=None, temperature=1.0):
    """Logits z [N, V] of a head and dz/dx [N, V], x = hidden weight^T + bias."""
    x = as_f64(hidden) @ as_f64(weight).T
    if bias is not None:
        x = x + as_f64(bias)
    if softcap is None:
        return x * (scale / temperature), np.full_like(x, scale / temperature)
    squash = np.tanh(scale * x / softcap)
    return softcap * squash / temperature, scale / temperature * (1 - squash**2)


def gradient_size(stat: str, p: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """Size of the terms whose difference a logit gradient is: even where they cancel, each of them
    has the size of p (2 p in col, p / a in alpha)."""
    name, _, text = stat.partition(":")
    return np.abs(grad) + p * {"col": 2.0, "alpha": 1 / float(text or 1)}.get(name, 1.0)


def token_stats(
    z, targets, stats, *, zr=None, values=None, rank_by=None, upstream=None, ignore_index=-100
):
    """Values {stat: [N]}, dz [N, V] for `upstream` {stat: [N]}, and the size of its terms [N, V].

    Ignored rows are 0.
    `values` is [V] or [N, V]; `z` of an ignored row is never looked at.
    """
    z, targets = as_f64(z), np.asarray(targets)
    n, v = z.shape
    zr = None if zr is None else as_f64(zr)
    out = {stat: np.zeros(n) for stat in stats}
    dz, size = np.zeros((n, v)), np.zeros((n, v))
    for i in range(n):
        if targets[i] == ignore_index:
            continue
        row_values = None if values is None else (values if values.ndim == 1 else values[i])
        row_zr, row_rank = (None if x is None else x[i] for x in (zr, rank_by))
        p = np.exp(log_softmax(z[i]))
        for stat in stats:
            value, grad = row_statistic(stat, z[i], int(targets[i]), row_zr, row_values, row_rank)
            out[stat][i] = value
            if upstream is not None and stat in upstream:
                c = float(upstream[stat][i])
                dz[i] += c * grad
                size[i] += abs(c) * gradient_size(stat, p, grad)
    return out, dz, size


@dataclass
class Truth:
    """What a head op must return, in float64, with the magnitudes that its floors are made of."""

    values: dict[str, np.ndarray]  # stat -> [N]
    logits: np.ndarray  # [M, V] of the scored rows
    grads: dict[str, np.ndarray] = field(default_factory=dict)  # hidden [N, D], weight, bias
    sizes: dict[str, np.ndarray] = field(default_factory=dict)  # the same sums over |terms|
    spreads: dict[str, np.ndarray] = field(default_factory=dict)  # root of the sums over terms^2
    dx: np.ndarray | None = None  # [M, V] gradient of the raw logits of the scored rows


def head_stats(
    hidden,  # [N, D]
    weight,  # [V, D]
    targets,  # [N]
    stats,
    upstream=None,  # {stat: [N]}
    *,
    bias=None,
    scale=1.0,
    softcap=None,
    temperature=1.0,
    ref_logits=None,  # [N, V]
    values=None,  # [V] or [N, V]
    rank_by=None,  # [N, V]
    ignore_index=-100,
) -> Truth:
    """Statistics of softmax(head(hidden)) and the gradients of sum_s <upstream_s, s>."""
    targets = np.asarray(targets)
    keep = np.flatnonzero(targets != ignore_index)
    h, w = as_f64(hidden)[keep], as_f64(weight)
    z, dz_dx = head_logits(h, w, bias, scale, softcap, temperature)

    def rows(x):
        return None if x is None else (x if x.ndim == 1 else x[keep])

    up = {s: as_f64(u)[keep] for s, u in (upstream or {}).items()}
    part, dz, size = token_stats(
        z,
        targets[keep],
        stats,
        zr=rows(ref_logits),
        values=rows(values),
        rank_by=rows(rank_by),
        upstream=up,
        ignore_index=ignore_index,
    )
    whole = {}
    for stat, x in part.items():
        whole[stat] = np.zeros(targets.shape[0])
        whole[stat][keep] = x
    truth = Truth(values=whole, logits=z)
    if upstream is None:
        return truth
    dx, dx_size = np.where(dz_dx == 0, 0.0, dz * dz_dx), size * np.abs(dz_dx)

    def whole_rows(x: np.ndarray) -> np.ndarray:  # [M, D] -> [N, D]
        out = np.zeros((targets.shape[0], x.shape[1]))
        out[keep] = x
        return out

    def products(a, b, c, finish=lambda x: x):  # dz, weight and hidden, or their moduli or squares
        return {
            "hidden": whole_rows(finish(a @ b)),
            "weight": finish(a.T @ c),
            "bias": finish(a.sum(0)),
        }

    truth.dx = dx
    truth.grads = products(dx, w, h)
    truth.sizes = products(dx_size, np.abs(w), np.abs(h))
    truth.spreads = products(dx**2, w**2, h**2, np.sqrt)
    return truth


def segment_sum(values, cu_seqlens, weights=None):  # [m, N], [S+1], [N] | [m, N] -> [m, S]
    """Correctly rounded sums of every segment (math.fsum)."""
    values = as_f64(values)
    weights = (
        np.ones_like(values) if weights is None else np.broadcast_to(as_f64(weights), values.shape)
    )
    bounds = [int(b) for b in cu_seqlens]
    out = np.zeros((values.shape[0], len(bounds) - 1))
    for m in range(values.shape[0]):
        for s in range(len(bounds) - 1):
            out[m, s] = math.fsum(
                float(values[m, i]) * float(weights[m, i]) for i in range(bounds[s], bounds[s + 1])
            )
    return out


def segment_sum_grads(d_out, values, cu_seqlens, weights=None):  # d_out [m, S]
    """d_values [m, N] and d_weights of weights' own shape (None without weights)."""
    values, d_out = as_f64(values), as_f64(d_out)
    weights = None if weights is None else as_f64(weights)
    d_values = np.zeros_like(values)
    d_weights = None if weights is None else np.zeros_like(weights)
    bounds = [int(b) for b in cu_seqlens]
    for m in range(values.shape[0]):
        for s in range(len(bounds) - 1):
            for i in range(bounds[s], bounds[s + 1]):
                if weights is None:
                    d_values[m, i] = d_out[m, s]
                elif d_weights.ndim == 1:
                    d_values[m, i] = d_out[m, s] * float(weights[i])
                    d_weights[i] += d_out[m, s] * values[m, i]
                else:
                    d_values[m, i] = d_out[m, s] * float(weights[m, i])
                    d_weights[m, i] += d_out[m, s] * values[m, i]
    return d_values, d_weights
