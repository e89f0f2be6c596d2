"""Eager twin of list_rank: every ranking family on padded blocks of groups of similar size.

Shapes: S items, G groups, g groups of one block padded to K items. Within a block everything is
[g, K] or [g, K, K]; blocks are cut so that a [g, K, K] tensor has at most BLOCK_ELEMENTS entries
(a single group may exceed it: a list of 5000 items takes 25 million).

The backward is not here: it is u times one number per group, the same for every backend, and lives
in the op. Every family returns the loss of each group and u = dL/ds by a hand-written derivative,
since a custom op's forward is below autograd. Rows and columns: i is the row, j the column; a
"pair" (i, j) has label y_i > y_j.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..list_blocks import blocks
from ..list_options import ListOptions, unpack

BLOCK_ELEMENTS = 1 << 21  # 16 MiB in fp64


class Block(NamedTuple):
    """Groups of one block; padding and masked items have score and label 0 and valid False."""

    score: Tensor  # [g, K]
    label: Tensor  # [g, K]
    valid: Tensor  # [g, K] bool
    topk: Tensor  # [g] stages wanted, at most the number of valid items


def list_rank_fwd(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S], NaN where masked
    cu_groups: Tensor,  # [G+1]
    topk: Tensor | None,  # [G] int64
    family: str,
    options: str,
) -> tuple[Tensor, Tensor]:  # [G], [S]
    """Loss of each group and its derivative with respect to each score, both in scores.dtype."""
    opts = unpack(options)
    core = {"pair": _pair, "plackett_luce": _plackett_luce, "softmax": _softmax}[family]
    loss = scores.new_zeros(cu_groups.numel() - 1)
    slope = torch.zeros_like(scores)
    for groups, items, inside in blocks(cu_groups, BLOCK_ELEMENTS):  # [g], [g, K], [g, K] bool
        label = labels.to(scores.dtype)[items]
        valid = inside & ~label.isnan()
        score = torch.where(valid, scores[items], 0.0)
        count = valid.sum(1)
        stages = count if topk is None else torch.minimum(topk[groups], count)
        block = Block(score, torch.where(valid, label, 0.0), valid, stages)
        block_loss, u = core(block, opts)
        # A number that is not finite makes its whole group NaN: never hidden, never spread.
        broken = ~(score.isfinite() & block.label.isfinite()).all(1)
        loss[groups] = torch.where(broken, torch.nan, block_loss)
        u = torch.where(broken[:, None] & valid, torch.nan, u)
        slope[items[valid]] = u[valid]
    return loss, slope


def _rank(value: Tensor, valid: Tensor) -> Tensor:  # [g, K] int64
    """1-based rank in descending order, equal values by position, counted without a sort."""
    position = torch.arange(value.shape[1], device=value.device)
    ahead = value[:, None, :] > value[:, :, None]
    ahead |= (value[:, None, :] == value[:, :, None]) & (position[None, :] < position[:, None])
    return 1 + (ahead & valid[:, None, :]).sum(2)


def _discount(rank: Tensor, dtype: torch.dtype, opts: ListOptions) -> Tensor:
    """1 / log_b(1 + rank), 0 beyond topn."""
    value = 1.0 / torch.log1p(rank.to(dtype))
    if opts.log_base == "2":
        value = value * math.log(2.0)
    return torch.where(rank > opts.topn, 0.0, value) if opts.topn else value


def _gain(label: Tensor, kind: str) -> Tensor:
    return torch.expm1(label * math.log(2.0)) if kind == "exp2" else label


def _compete(value: Tensor, member: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """LSE of the members of each last axis less `own`, and the softmax of the members.

    The greatest member is taken off first: LSE - own of two numbers near 500 would keep no digit of
    a small difference in fp32. An axis without members gives 0 and 0.
    """
    top = torch.where(member, value, -torch.inf).amax(-1)
    top = torch.where(member.any(-1), top, own)
    weight = torch.where(member, torch.exp(value - top[..., None]), 0.0)
    total = weight.sum(-1)
    total = torch.where(total > 0, total, 1.0)
    return torch.log(total) + (top - own), weight / total[..., None]


def _lambda_weights(b: Block, opts: ListOptions) -> Tensor:  # [g, K, K]
    """|G_i - G_j| |D_i - D_j|: what exchanging two items does to the DCG of the current ranking."""
    dtype = b.score.dtype
    y_i, y_j = b.label[:, :, None], b.label[:, None, :]
    if opts.gain == "exp2":
        # 2^max (1 - 2^-|difference|): no cancellation between close labels.
        gain = torch.exp2(torch.maximum(y_i, y_j)) * -torch.expm1(
            -(y_i - y_j).abs() * math.log(2.0)
        )
    else:
        gain = (y_i - y_j).abs()
    source = b.score if opts.rank_source == "score" else b.label
    rank = _rank(source, b.valid)
    if opts.form == "dcg2":
        apart = (rank[:, :, None] - rank[:, None, :]).abs()
        near = _discount(apart.clamp(min=1), dtype, opts)  # the diagonal, apart 0, is no pair
        return gain * (near - _discount(apart + 1, dtype, opts)).abs()
    discount = _discount(rank, dtype, opts)
    if opts.tie_rank == "average":
        tied = (source[:, :, None] == source[:, None, :]) & b.valid[:, None, :]
        discount = torch.where(tied, discount[:, None, :], 0.0).sum(2) / tied.sum(2).clamp(min=1)
    if opts.normalize:
        best = _discount(_rank(b.label, b.valid), dtype, opts)
        ideal = torch.where(b.valid, _gain(b.label, opts.gain) * best, 0.0).sum(1)  # [g]
        gain = gain / torch.where(ideal == 0, 1.0, ideal)[:, None, None]
    return gain * (discount[:, :, None] - discount[:, None, :]).abs()


def _pair(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = sum_{y_i > y_j} w_ij softplus(-(s_i - s_j)); slope -w_ij sigmoid(-(s_i - s_j))."""
    strict = b.label[:, :, None] > b.label[:, None, :]
    strict &= b.valid[:, :, None] & b.valid[:, None, :]
    gap = b.score[:, :, None] - b.score[:, None, :]
    if opts.weights == "lambda":
        weight = _lambda_weights(b, opts)
    elif opts.weights == "labeldiff":
        weight = (b.label[:, :, None] - b.label[:, None, :]).abs()
    else:
        weight = torch.ones_like(gap)
    loss = torch.where(strict, -weight * logsigmoid(gap), 0.0).sum((1, 2))
    slope = torch.where(strict, -weight * torch.sigmoid(-gap), 0.0)
    u = slope.sum(2) - slope.sum(1)
    factor = torch.ones_like(loss)
    if opts.pair_reduction == "mean":
        factor = factor / strict.sum((1, 2)).clamp(min=1)
    if opts.scale_by_list_size:
        factor = factor * b.valid.sum(1)
    return loss * factor, u * factor[:, None]


def _plackett_luce(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = sum over stages i of g_i (A_i - s_i), A_i = log sum exp of the scores in i's risk set.

    u_j = sum_i g_i exp(s_j - A_i) [j in risk set of i] - g_j [j is a stage]. Risk sets: stable, the
    items not ranked before i; breslow, the items with y_j <= y_i; strict, i and the items with
    y_j < y_i. Stages: the first topk ranks, where breslow and strict take a tied block whole, so
    that the order in which tied items are stored never matters.
    """
    y_i, y_j = b.label[:, :, None], b.label[:, None, :]
    both = b.valid[:, :, None] & b.valid[:, None, :]
    rank = _rank(b.label, b.valid)
    if opts.ties == "stable":
        risk = rank[:, None, :] >= rank[:, :, None]
    else:
        rank = 1 + ((y_j > y_i) & both).sum(2)
        own = torch.eye(b.score.shape[1], dtype=torch.bool, device=b.score.device)
        risk = y_j <= y_i if opts.ties == "breslow" else (y_j < y_i) | own
    risk = risk & both
    stage = b.valid & (rank <= b.topk[:, None])
    factor = stage.to(b.score.dtype)
    if opts.item_gain == "exp2":
        factor = factor * _gain(b.label, "exp2")
    excess, chance = _compete(b.score[:, None, :].expand_as(risk), risk, b.score)
    loss = torch.where(stage, factor * excess, 0.0).sum(1)
    return loss, _drive(factor[:, :, None] * chance)


def _drive(push: Tensor) -> Tensor:  # [g, K]
    """u_j = sum_i push_ij [i != j] - sum_k push_jk [k != j], for push_ij = f_i softmax_i(j).

    The second sum is f_j (1 - softmax_j(j)) without the cancellation that costs a nearly certain
    item half its digits in fp32.
    """
    others = push - torch.diag_embed(push.diagonal(dim1=1, dim2=2))
    return others.sum(1) - others.sum(2)


def _softmax(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = sum_i q_i (A - s_i), A = log sum exp s; u_i = sum_k q_k (softmax(s)_i - [k = i])."""
    if opts.target == "softmax":
        q = _compete(b.label / opts.alpha, b.valid, torch.zeros_like(b.label[:, 0]))[1]
    else:
        q = b.label
        if opts.target == "sum":
            total = q.sum(1, keepdim=True)
            q = torch.where(total > 0, q / torch.where(total > 0, total, 1.0), 0.0)
    # Relative to the greatest score, as in _compete; a row without valid items has q = 0.
    top = torch.where(b.valid, b.score, -torch.inf).amax(1)
    top = torch.where(b.valid.any(1), top, 0.0)
    excess, chance = _compete(b.score, b.valid, top)  # [g], [g, K]
    loss = torch.where(b.valid, q * (excess[:, None] + (top[:, None] - b.score)), 0.0).sum(1)
    return loss, _drive(q[:, :, None] * chance[:, None, :])
