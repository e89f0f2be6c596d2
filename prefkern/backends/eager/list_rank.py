"""Eager twin of list_rank: every ranking family on padded blocks of groups of similar size.

Shapes: S items, G groups, g groups of one block padded to K items. Within a block everything is
[g, K] or [g, K, K]; blocks are cut so that a [g, K, K] tensor has at most BLOCK_ELEMENTS entries
(a single group may exceed it: a list of 5000 items takes 25 million).

The backward is not here: it is u times one number per group, the same for every backend, and lives
in the op. Every family returns the loss of each group and u = dL/ds by a hand-written derivative:
automatic differentiation of max and abs forms is wrong at exact ties, and at the first step of
training, when policy equals reference, every score is tied. Rows and columns: i is the row, j the
column; a "pair" (i, j) has label y_i > y_j.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..list_options import ListOptions, unpack
from . import list_blocks as lb
from . import list_surrogates
from .list_blocks import Block


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
    core = _CORES[family]
    loss = scores.new_zeros(cu_groups.numel() - 1)
    slope = torch.zeros_like(scores)
    for groups, items, inside in lb.blocks(cu_groups):  # [g], [g, K], [g, K] bool
        label = labels.to(scores.dtype)[items]
        valid = inside & ~label.isnan()
        score = torch.where(valid, scores[items], 0.0)
        count = valid.sum(1)
        stages = count if topk is None else torch.minimum(topk[groups], count)
        block = Block(score, torch.where(valid, label, 0.0), valid, stages)
        block_loss, u = core(block, opts)
        # A non-finite score makes its whole group NaN: never hidden, never spread to other groups.
        broken = ~score.isfinite().all(1)
        loss[groups] = torch.where(broken, torch.nan, block_loss)
        u = torch.where(broken[:, None] & valid, torch.nan, u)
        slope[items[valid]] = u[valid]
    return loss, slope


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
    rank = lb.rank(source, b.valid)
    if opts.form == "dcg2":
        apart = (rank[:, :, None] - rank[:, None, :]).abs()
        near = lb.discount(apart.clamp(min=1), dtype, opts)  # the diagonal, apart 0, is no pair
        return gain * (near - lb.discount(apart + 1, dtype, opts)).abs()
    discount = lb.discount(rank, dtype, opts)
    if opts.tie_rank == "average":
        tied = (source[:, :, None] == source[:, None, :]) & b.valid[:, None, :]
        discount = torch.where(tied, discount[:, None, :], 0.0).sum(2) / tied.sum(2).clamp(min=1)
    if opts.normalize:
        best = lb.discount(lb.rank(b.label, b.valid), dtype, opts)
        ideal = torch.where(b.valid, lb.gain(b.label, opts.gain) * best, 0.0).sum(1)  # [g]
        gain = gain / torch.where(ideal == 0, 1.0, ideal)[:, None, None]
    return gain * (discount[:, :, None] - discount[:, None, :]).abs()


def _pair(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = sum_{y_i > y_j} w_ij softplus(-(s_i - s_j)); slope -w_ij sigmoid(-(s_i - s_j))."""
    strict, gap = lb.pairs(b)
    if opts.weights == "lambda":
        weight = _lambda_weights(b, opts)
    elif opts.weights == "labeldiff":
        weight = (b.label[:, :, None] - b.label[:, None, :]).abs()
    else:
        weight = torch.ones_like(gap)
    value = torch.where(strict, -weight * logsigmoid(gap), 0.0)
    slope = torch.where(strict, -weight * torch.sigmoid(-gap), 0.0)
    return lb.fold_pairs(b, strict, value, slope, opts)


def _hinge(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = sum_{y_i > y_j} max(0, margin - (s_i - s_j)); slope -1 below the kink, 0 at it."""
    strict, gap = lb.pairs(b)
    active = strict & (gap < opts.margin)
    value = torch.where(active, opts.margin - gap, 0.0)
    return lb.fold_pairs(b, strict, value, -active.to(gap.dtype), opts)


def _plackett_luce(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = sum over stages i of g_i (A_i - s_i), A_i = log sum exp of the scores in i's risk set.

    u_j = sum_i g_i exp(s_j - A_i) [j in risk set of i] - g_j [j is a stage]. Risk sets: stable, the
    items not ranked before i; breslow, the items with y_j <= y_i; strict, i and the items with
    y_j < y_i. Stages: the first topk ranks, where breslow and strict take a tied block whole, so
    that the order in which tied items are stored never matters.
    """
    y_i, y_j = b.label[:, :, None], b.label[:, None, :]
    both = b.valid[:, :, None] & b.valid[:, None, :]
    rank = lb.rank(b.label, b.valid)
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
        factor = factor * lb.gain(b.label, "exp2")
    excess, chance = lb.compete(b.score[:, None, :].expand_as(risk), risk, b.score)
    loss = torch.where(stage, factor * excess, 0.0).sum(1)
    return loss, _drive(factor[:, :, None] * chance)


def _drive(push: Tensor) -> Tensor:  # [g, K]
    """u_j = sum_i push_ij [i != j] - sum_k push_jk [k != j], for push_ij = f_i softmax_i(j).

    The second sum is f_j (1 - softmax_j(j)) without the cancellation that costs a nearly certain
    item half its digits in fp32.
    """
    others = push - torch.diag_embed(push.diagonal(dim1=1, dim2=2))
    return others.sum(1) - others.sum(2)


def _masked_softmax(value: Tensor, valid: Tensor) -> Tensor:  # [g, K]
    """Softmax over the valid items of each row; 0 elsewhere and in rows without any."""
    return lb.compete(value, valid, torch.zeros_like(value[:, 0]))[1]


def _softmax(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = sum_i q_i (A - s_i), A = log sum exp s; u_i = sum_k q_k (softmax(s)_i - [k = i])."""
    if opts.target == "softmax":
        q = _masked_softmax(b.label / opts.alpha, b.valid)
    else:
        q = b.label
        if opts.target == "sum":
            total = q.sum(1, keepdim=True)
            q = torch.where(total > 0, q / torch.where(total > 0, total, 1.0), 0.0)
    # Relative to the greatest score, as in compete; a row without valid items has q = 0.
    top = torch.where(b.valid, b.score, -torch.inf).amax(1)
    top = torch.where(b.valid.any(1), top, 0.0)
    excess, chance = lb.compete(b.score, b.valid, top)  # [g], [g, K]
    loss = torch.where(b.valid, q * (excess[:, None] + (top[:, None] - b.score)), 0.0).sum(1)
    return loss, _drive(q[:, :, None] * chance[:, None, :])


def _nca(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = -sum_i q_i log sigmoid(s_i) - 1/K sum_i log sigmoid(-s_i), q = softmax(y / alpha)."""
    q = _masked_softmax(b.label / opts.alpha, b.valid)
    share = b.valid.to(q.dtype) / b.valid.sum(1, keepdim=True).clamp(min=1)
    loss = (-q * logsigmoid(b.score) - share * logsigmoid(-b.score)).sum(1)
    return loss, share * torch.sigmoid(b.score) - q * torch.sigmoid(-b.score)


def _pro(b: Block, opts: ListOptions) -> tuple[Tensor, Tensor]:
    """l = sum over ranks k < K of LSE({M_k a_k} + {m_ki a_i: i after k}) - M_k a_k.

    m_ki = y_k - y_i >= 0, M_k = max_i m_ki. With q the softmax of that set, u_k += M_k (q_k - 1)
    and u_i += m_ki q_i. A group whose labels are all equal gives 0.
    """
    strict, _ = lb.pairs(b)
    rank = lb.rank(b.label, b.valid)
    after = (rank[:, None, :] > rank[:, :, None]) & b.valid[:, :, None] & b.valid[:, None, :]
    gap = torch.where(after, b.label[:, :, None] - b.label[:, None, :], 0.0)  # m [g, k, i]
    widest = gap.amax(2)  # M [g, k]
    own = torch.eye(gap.shape[1], dtype=torch.bool, device=gap.device)
    factor = torch.where(own, widest[:, :, None], gap)
    member = (after | own) & after.any(2)[:, :, None]
    member &= strict.any((1, 2))[:, None, None]
    stage = member.any(2)
    excess, chance = lb.compete(factor * b.score[:, None, :], member, widest * b.score)
    loss = torch.where(stage, excess, 0.0).sum(1)
    # q_kk - 1 = -sum of the others, as in _drive, but row k is pushed by M_k and column i by m_ki.
    others = torch.where(own, 0.0, chance)
    return loss, (factor * others).sum(1) - widest * others.sum(2)


_CORES = {
    "pair": _pair,
    "hinge": _hinge,
    "plackett_luce": _plackett_luce,
    "softmax": _softmax,
    "pro": _pro,
    "nca": _nca,
    **list_surrogates.CORES,
}
