"""Eager twins of the ranking families beyond pairs and likelihoods; see reference/list_rank.py.

Shapes: g groups of one block padded to K items; [g, K] or [g, K, K]. Each core returns the loss of
each group and its hand-written derivative u [g, K] with respect to the scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..list_options import ListOptions
from .list_blocks import Block, compete, discount, fold_pairs, gain, pairs, rank

LN2 = math.log(2.0)


def rank_hinge(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = sum_{y_i > y_j} max(0, c_ij - (s_i - s_j)), or c_ij max(0, -(s_i - s_j)) as a product.

    c_ij = scale (r_j - r_i), r the rank by label, over K if `per_item`. Slope 0 at the kink.
    """
    strict, gap = pairs(b)
    place = rank(b.label, b.valid).to(b.score.dtype) * opts.scale
    if opts.per_item:
        place = place / b.valid.sum(1, keepdim=True).clamp(min=1)
    apart = place[:, None, :] - place[:, :, None]
    factor, margin = (1.0, apart) if opts.mode == "margin" else (apart, 0.0)
    active = strict & (gap < margin)
    value = torch.where(active, factor * (margin - gap), 0.0)
    slope = torch.where(active, -factor * torch.ones_like(gap), 0.0)
    return fold_pairs(b, strict, value, slope, opts)


def anchor(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = 1/(K-1) sum_i mu_i [softplus(-s_i) + c_i sum_{y_j < y_i} softplus(s_j)].

    i runs over all items but the last in label order, c_i = 1 or 1 / (number of lower items), and
    mu_i = (s_i - min s) / (max s - min s) is constant, 1 where all scores are equal.
    """
    strict, _ = pairs(b)
    count = b.valid.sum(1, keepdim=True)
    low = torch.where(b.valid, b.score, torch.inf).amin(1, keepdim=True)
    span = torch.where(b.valid, b.score, -torch.inf).amax(1, keepdim=True) - low
    mu = torch.where(span > 0, (b.score - low) / torch.where(span > 0, span, 1.0), 1.0)
    # Groups whose labels are all equal have nothing to anchor.
    anchored = b.valid & (rank(b.label, b.valid) < count) & strict.any((1, 2))[:, None]
    mu = torch.where(anchored, mu, 0.0) / (count - 1).clamp(min=1)
    lower = strict.to(b.score.dtype)
    if opts.inner == "mean":
        lower = lower / strict.sum(2, keepdim=True).clamp(min=1)
    push = (mu[:, :, None] * lower).sum(1)  # [g, K] what each item weighs as a lower one
    above = torch.where(b.valid, -logsigmoid(b.score), 0.0)
    below = torch.where(b.valid, -logsigmoid(-b.score), 0.0)
    loss = (mu * above + push * below).sum(1)
    return loss, push * torch.sigmoid(b.score) - mu * torch.sigmoid(-b.score)


def set_contrast(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = LSE(x) - LSE(x over Y+), x = s + deviation |y - mean y|, Y+ = {y > mean y}.

    u_i = softmax(x)_i - [i in Y+] softmax(x over Y+)_i; 0 where Y+ is empty.
    """
    count = b.valid.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(b.valid, b.label, 0.0).sum(1, keepdim=True) / count
    off = b.label - mean
    # A mean of equal labels may be off by rounding; a side must hold a real difference.
    spread = pairs(b)[0].any((1, 2))[:, None]
    good, bad = b.valid & spread & (off > 0), b.valid & spread & (off <= 0)
    x = b.score + opts.deviation * off.abs()
    top = torch.where(good, x, -torch.inf).amax(1)
    top = torch.where(good.any(1), top, 0.0)
    with_good, within = compete(x, good, top)  # LSE(x over Y+) - top, softmax over Y+
    with_bad, among = compete(x, bad, top)
    # l = softplus(LSE(Y-) - LSE(Y+)): no difference of two nearly equal normalisers.
    margin = with_good - with_bad
    loss = torch.where(good.any(1), -logsigmoid(margin), 0.0)
    lost = torch.where(good.any(1), torch.sigmoid(-margin), 0.0)[:, None]  # mass of Y-
    return loss, lost * (among - within)


def _shares(b: Block) -> Tensor:  # [g, K]
    """Gains over the ideal DCG; 0 where that is 0 or all labels are equal."""
    gains = torch.where(b.valid, gain(b.label, "exp2"), 0.0)
    best = discount(rank(b.label, b.valid), b.score.dtype, ListOptions(log_base="2"))
    ideal = torch.where(b.valid, gains * best, 0.0).sum(1, keepdim=True)
    real = (ideal != 0) & pairs(b)[0].any((1, 2))[:, None]
    return torch.where(real, gains / torch.where(ideal != 0, ideal, 1.0), 0.0)


def approx_ndcg(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = -sum_i (G_i / Z) / log2(1 + r_i), r_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / T).

    With c_i = (G_i / Z) ln 2 / ((1 + r_i) ln^2(1 + r_i)) and sigma' = sigma (1 - sigma):
    u_m = 1/T sum_i (c_i - c_m) sigma'((s_m - s_i) / T).
    """
    own = torch.eye(b.score.shape[1], dtype=torch.bool, device=b.score.device)
    other = b.valid[:, :, None] & b.valid[:, None, :] & ~own
    x = (b.score[:, None, :] - b.score[:, :, None]) / opts.temperature  # [g, i, j] s_j - s_i
    soft = 1.0 + torch.where(other, torch.sigmoid(x), 0.0).sum(2)  # [g, K]
    share = _shares(b)
    log = torch.log1p(soft)
    loss = -(share * LN2 / log).sum(1)
    pull = share * LN2 / ((1.0 + soft) * log * log)
    slope = torch.where(other, torch.sigmoid(x) * torch.sigmoid(-x), 0.0)
    u = (slope * (pull[:, None, :] - pull[:, :, None])).sum(2) / opts.temperature
    return loss, u


def neural_ndcg(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = -1/Z sum_i D_i sum_j P_ij G_j, P the Sinkhorn-scaled NeuralSort of the scores.

    P_ij = softmax_j(((K + 1 - 2i) s_j - sum_k |s_j - s_k|) / tau); then `sinkhorn_iters` times
    columns and rows are divided by their sums. |.| has the derivative 0 at a tie.
    """
    size = b.valid.sum(1)  # [g] K of each group
    row = torch.arange(1, b.score.shape[1] + 1, device=b.score.device)
    cell = (row <= size[:, None])[:, :, None] & b.valid[:, None, :]  # [g, i, j]
    both = b.valid[:, :, None] & b.valid[:, None, :]
    gap = b.score[:, :, None] - b.score[:, None, :]
    apart = torch.where(both, gap.abs(), 0.0).sum(2)
    place = (size[:, None] + 1 - 2 * row).to(b.score.dtype)  # [g, i]
    logit = (place[:, :, None] * b.score[:, None, :] - apart[:, None, :]) / opts.temperature
    first = compete(logit, cell, torch.zeros_like(place))[1]
    scaled = first
    sums = []  # two vectors per round: the backward multiplies its way back through them
    for _ in range(opts.sinkhorn_iters):
        for dim in (1, 2):
            total = scaled.sum(dim, keepdim=True)
            total = torch.where(total > 0, total, 1.0)
            sums.append((dim, total))
            scaled = scaled / total
    share = _shares(b)
    value = discount(row, b.score.dtype, ListOptions(log_base="2"))  # [i]
    loss = -(scaled * value[:, None] * share[:, None, :]).sum((1, 2))
    # Backward through y = x / sum(x): dx = (dy - sum(dy y)) / sum(x), then softmax and |.|.
    push = -torch.where(cell, value[:, None] * share[:, None, :], 0.0)
    for dim, total in reversed(sums):
        push = torch.where(cell, (push - (push * scaled).sum(dim, keepdim=True)) / total, 0.0)
        scaled = scaled * total
    push = first * (push - (push * first).sum(2, keepdim=True)) / opts.temperature
    through_abs = -push.sum(1)  # [g, j] dl/d apart_j
    sign = torch.where(both, torch.sign(gap), 0.0)  # [g, j, k]
    u = (push * place[:, :, None]).sum(1)
    u = u + through_abs * sign.sum(2) - (through_abs[:, :, None] * sign).sum(1)
    return loss, u


CORES = {
    "rank_hinge": rank_hinge,
    "anchor": anchor,
    "set_contrast": set_contrast,
    "approx_ndcg": approx_ndcg,
    "neural_ndcg": neural_ndcg,
}
