"""The baseline of the three-way rule: the head and the statistics as plain PyTorch with autograd.

Product in the working dtype, then float32 log_softmax and sums (never log_softmax in 16 bits); the
backward's products are autograd's, in the working dtype. Float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def head_logits(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None = None,  # [V]
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:  # [N, V] fp32
    x = wide(hidden @ weight.to(hidden.dtype).T)
    if bias is not None:
        x = x + bias.to(x.dtype)
    if softcap is not None:
        return softcap * torch.tanh(scale * x / softcap) / temperature
    return scale * x / temperature


def _product(p: Tensor, x: Tensor) -> Tensor:
    """p * x with 0 * inf = 0, in value and gradient."""
    live = p > 0
    return torch.where(live, p, 0.0) * torch.where(live, x, 0.0)


def statistic(
    stat: str, z: Tensor, y: Tensor, zr: Tensor | None, values: Tensor | None
) -> Tensor:  # [N]
    name, _, text = stat.partition(":")
    arg = float(text) if text else None
    lp = torch.log_softmax(z, -1)
    at = y[:, None]
    if name == "logp":
        return lp.gather(1, at)[:, 0]
    if name == "lse":
        return torch.logsumexp(z, -1)
    if name == "zy":
        return z.gather(1, at)[:, 0]
    p = lp.exp()
    if name == "ent":
        return -_product(p, lp).sum(-1)
    if name == "col":
        return (p * p).sum(-1).log()
    if name == "top1":
        return (z.argmax(-1) == y).to(z.dtype)
    if name == "zmean":
        live = z.isfinite()
        return torch.where(live, z, 0.0).sum(-1) / live.sum(-1)
    if name == "ev":
        return _product(p, values.expand_as(p)).sum(-1)
    lr = torch.log_softmax(zr, -1)
    r = lr.exp()
    if name == "ref_logp":
        return lr.gather(1, at)[:, 0]
    if name == "ref_lse":
        return torch.logsumexp(zr, -1)
    if name == "fkl":
        return _product(r, lr - torch.where(r > 0, lp, 0.0)).sum(-1)
    if name == "rkl":
        return _product(p, lp - torch.where(p > 0, lr, 0.0)).sum(-1)
    if name == "jsd":
        mix = arg * r + (1 - arg) * p
        lmix = torch.where(mix > 0, mix, 1.0).log()
        return (arg * _product(r, lr - lmix) + (1 - arg) * _product(p, lp - lmix)).sum(-1)
    if name in ("alpha", "renyi"):
        live = lp.isfinite() & lr.isfinite()
        terms = (arg * torch.where(live, lr, 0.0) + (1 - arg) * torch.where(live, lp, 0.0)).exp()
        mass = torch.where(live, terms, 0.0).sum(-1)
        return (1 - mass) / (arg * (1 - arg)) if name == "alpha" else mass.log() / (arg - 1)
    if name == "tv":
        return 0.5 * (p - r).abs().sum(-1)
    if name == "bkl":
        k = min(int(arg), z.shape[-1])
        head = torch.zeros_like(z, dtype=torch.bool)
        # a stable descending sort sends ties to the lower index, which topk does not promise
        head.scatter_(1, zr.sort(dim=-1, descending=True, stable=True).indices[:, :k], True)
        inside = torch.where(head, _product(r, lr - torch.where(r > 0, lp, 0.0)), 0.0).sum(-1)
        if k == z.shape[-1]:
            return inside
        rest_r, rest_p = (torch.where(head, 0.0, q).sum(-1) for q in (r, p))
        return inside + rest_r * (rest_r / rest_p).log()
    if name == "mix":
        return torch.log_softmax((1 - arg) * z + arg * zr, -1).gather(1, at)[:, 0]
    raise AssertionError(f"the baseline knows no statistic {stat!r}")


def token_stats(
    z: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    stats,
    *,
    zr: Tensor | None = None,  # [N, V]
    values: Tensor | None = None,  # [V] or [N, V]
    ignore_index: int = -100,
) -> dict[str, Tensor]:  # stat -> [N]
    """Every statistic of the scored rows, 0 elsewhere; rows are selected before any arithmetic."""
    keep = (targets != ignore_index).nonzero()[:, 0]
    rows = [None if x is None else (x if x.ndim == 1 else x[keep]) for x in (zr, values)]
    out = {}
    for stat in stats:
        part = statistic(stat, z[keep], targets[keep], *rows)
        out[stat] = torch.zeros(targets.shape[0], dtype=part.dtype).index_put((keep,), part)
    return out
