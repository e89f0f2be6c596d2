"""The same steps in float64, written apart from every variant: what errors are measured against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cases import ALPHA, BETA, IGNORE, NEEDS, Case, Inputs

ROWS = 256  # logits of one block: 256 * 152,064 * 8 bytes = 300 MiB


class Truth(NamedTuple):
    loss: Tensor  # []
    tokens: dict[str, Tensor]  # statistic -> [N]
    gradients: dict[str, Tensor]  # as in Inputs.leaves


def evaluate(case: Case, inputs: Inputs) -> Truth:
    """Loss and gradients in float64 on the inputs' device; logits exist for ROWS rows at a time."""
    h, w = inputs.hidden.detach().double(), inputs.weight.detach().double()
    rh, rw = inputs.ref_hidden.double(), inputs.ref_weight.double()
    y, names = inputs.targets, NEEDS[case.step]
    blocks = [slice(i, i + ROWS) for i in range(0, len(y), ROWS)]
    with torch.no_grad():
        parts = [statistics(names, h[b], w, rh[b], rw, y[b]) for b in blocks]
    stats = [torch.cat(column).requires_grad_(True) for column in zip(*parts, strict=True)]
    loss = reduce(case.step, stats, inputs)
    upstream = torch.autograd.grad(loss, stats, allow_unused=True)

    d_hidden = torch.empty_like(h)
    weight = w.requires_grad_(not case.frozen)
    for b in blocks:
        rows = h[b].clone().requires_grad_(True)
        values = statistics(names, rows, weight, rh[b], rw, y[b])
        live = [i for i, v in enumerate(values) if v.requires_grad and upstream[i] is not None]
        torch.autograd.backward([values[i] for i in live], [upstream[i][b] for i in live])
        d_hidden[b] = rows.grad
    gradients = {"d_hidden": d_hidden}
    if not case.frozen:
        gradients["d_weight"] = weight.grad
    tokens = {name: x.detach() for name, x in zip(names, stats, strict=True)}
    return Truth(loss.detach(), tokens, gradients)


def statistics(
    names: tuple[str, ...], h: Tensor, w: Tensor, rh: Tensor, rw: Tensor, y: Tensor
) -> list[Tensor]:
    """Per-token statistics; ignored rows are 0."""
    keep = y != IGNORE
    index = y.clamp(min=0)[:, None]
    lp = (h @ w.T).log_softmax(-1)
    lr = (rh @ rw.T).log_softmax(-1) if set(names) - {"logp", "ent"} else lp
    found = []
    for name in names:
        if name == "logp":
            value = lp.gather(1, index)[:, 0]
        elif name == "ref_logp":
            value = lr.gather(1, index)[:, 0]
        elif name == "ent":
            value = -(lp.exp() * lp).sum(-1)
        elif name == "fkl":
            value = (lr.exp() * (lr - lp)).sum(-1)
        elif name == "rkl":
            value = (lp.exp() * (lp - lr)).sum(-1)
        else:
            mean = ((lp.exp() + lr.exp()) / 2).log()
            value = ((lp.exp() * (lp - mean)).sum(-1) + (lr.exp() * (lr - mean)).sum(-1)) / 2
        found.append(torch.where(keep, value, 0.0))
    return found


def reduce(step: str, stats: list[Tensor], inputs: Inputs) -> Tensor:
    """The loss [] of a step from its statistics [N], in the order of NEEDS."""
    if step in ("logp", "ent", "tdpo"):
        given = zip(NEEDS[step], stats, strict=True)
        return sum((inputs.upstream[s].double() * x).sum() for s, x in given if s != "ref_logp")
    if step not in ("dpo", "tdpo2"):
        sign = -1 if step == "ce" else 1
        return sign * stats[0].sum() / (inputs.targets != IGNORE).sum()
    sums = [x.view(inputs.S, -1).sum(1) for x in stats]
    pairs = inputs.S // 2
    ratio = sums[0] - sums[1]
    margin = ratio[:pairs] - ratio[pairs:]
    if step == "tdpo2":
        margin = margin - ALPHA * (sums[2][pairs:] - sums[2][:pairs].detach())
    return -torch.nn.functional.logsigmoid(BETA * margin).mean()


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the Euclidean norm, block by block; NaN stays NaN."""
    pairs = zip(got.reshape(-1).split(1 << 26), want.reshape(-1).split(1 << 26), strict=True)
    gap = sum(float((a.double() - b).square().sum()) for a, b in pairs)
    scale = float(want.norm())
    return gap**0.5 / (scale if scale > 0 else 1.0)
