"""The same steps in float64, written apart from every variant: what errors are measured against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cases import ALPHA, BETA, IGNORE, Case, Inputs

ROWS = 256  # logits of one block: 256 * 128,256 * 8 bytes = 250 MiB at the largest vocabulary


class Truth(NamedTuple):
    loss: Tensor  # []
    d_hidden: Tensor  # [N, D]
    d_weight: Tensor | None  # [V, D], None with a frozen head


def evaluate(case: Case, inputs: Inputs) -> Truth:
    """Loss and gradients in float64; logits exist for ROWS rows at a time."""
    h, w = inputs.hidden.detach().double(), inputs.weight.detach().double()
    rh, rw = inputs.ref_hidden.double(), inputs.ref_weight.double()
    y = inputs.targets
    blocks = [slice(i, i + ROWS) for i in range(0, len(y), ROWS)]
    with torch.no_grad():
        parts = [_tokens(case.step, h[b], w, rh[b], rw, y[b]) for b in blocks]
    stats = [torch.cat(column).requires_grad_(True) for column in zip(*parts, strict=True)]
    loss = _reduce(case.step, stats, y, inputs.S)
    upstream = torch.autograd.grad(loss, stats, allow_unused=True)

    d_hidden = torch.empty_like(h)
    weight = w.requires_grad_(not case.frozen)
    for b in blocks:
        rows = h[b].clone().requires_grad_(True)
        values = _tokens(case.step, rows, weight, rh[b], rw, y[b])
        live = [i for i, v in enumerate(values) if v.requires_grad and upstream[i] is not None]
        torch.autograd.backward([values[i] for i in live], [upstream[i][b] for i in live])
        d_hidden[b] = rows.grad
    return Truth(loss.detach(), d_hidden, weight.grad)


def _tokens(
    step: str, h: Tensor, w: Tensor, rh: Tensor, rw: Tensor, y: Tensor
) -> tuple[Tensor, ...]:
    """Per-token statistics; ignored rows are 0."""
    keep = y != IGNORE
    index = y.clamp(min=0)[:, None]
    lp, lr = (h @ w.T).log_softmax(-1), (rh @ rw.T).log_softmax(-1)
    if step in ("dpo", "tdpo2"):
        found = [lp.gather(1, index)[:, 0], lr.gather(1, index)[:, 0]]
        if step == "tdpo2":
            found.append((lr.exp() * (lr - lp)).sum(-1))
    elif step == "fkl":
        found = [(lr.exp() * (lr - lp)).sum(-1)]
    elif step == "rkl":
        found = [(lp.exp() * (lp - lr)).sum(-1)]
    else:
        mean = ((lp.exp() + lr.exp()) / 2).log()
        found = [((lp.exp() * (lp - mean)).sum(-1) + (lr.exp() * (lr - mean)).sum(-1)) / 2]
    return tuple(torch.where(keep, x, 0.0) for x in found)


def _reduce(step: str, stats: list[Tensor], y: Tensor, sequences: int) -> Tensor:
    if step not in ("dpo", "tdpo2"):
        return stats[0].sum() / (y != IGNORE).sum()
    sums = [x.view(sequences, -1).sum(1) for x in stats]
    pairs = sequences // 2
    ratio = sums[0] - sums[1]
    margin = ratio[:pairs] - ratio[pairs:]
    if step == "tdpo2":
        margin = margin - ALPHA * (sums[2][pairs:] - sums[2][:pairs].detach())
    return -torch.nn.functional.logsigmoid(BETA * margin).mean()


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the Euclidean norm; NaN stays NaN."""
    scale = want.norm().item()
    return (got.double() - want).norm().item() / (scale if scale > 0 else 1.0)
