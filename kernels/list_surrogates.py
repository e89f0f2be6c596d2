"""The ranking families that visit every item on its own, or all ordered pairs of items."""

from __future__ import annotations

import triton
import triton.language as tl

from .list_blocks import (
    LN2,
    discount,
    exp2m1,
    group_facts,
    load_items,
    log1p,
    log_base,
    logistic,
    rank_of,
    store_items,
    store_loss,
)

# What the targets q are made of: softmax(label / alpha), shares of the sum, labels as they are.
SOFTMAX, SUM, NONE = (tl.constexpr(code) for code in range(3))


@triton.jit
def _target(y, valid, high, alpha, weight, target):
    raw = tl.exp(tl.where(valid, y / alpha - high / alpha, -float("inf")))
    return tl.where(valid, tl.where(target == SOFTMAX, raw, y) * weight, 0.0)


@triton.jit(do_not_specialize=["target"])
def list_shares_kernel(
    scores,  # [S] fp64
    labels,  # [S] fp64
    cu_groups,  # [G+1] int32
    number,  # [1] fp64: temperature alpha of softmax targets
    loss,  # [G] fp64
    slope,  # [S] fp64
    target,
    FAMILY: tl.constexpr,  # softmax, nca
    BLOCK: tl.constexpr,
):
    """softmax: l = sum_i q_i (LSE(s) - s_i); nca: see prefkern.ops.list_rank."""
    g = tl.program_id(0)
    start = tl.load(cu_groups + g).to(tl.int64)
    size = (tl.load(cu_groups + g + 1) - start).to(tl.int32)
    count, broken, _low, high = group_facts(scores, labels, start, size, BLOCK)
    alpha = tl.load(number)
    zero = tl.zeros((BLOCK,), tl.float64)
    tops = zero - float("inf")
    sums = zero
    for r in range(0, size, BLOCK):
        s, y, valid = load_items(scores, labels, start, r + tl.arange(0, BLOCK), size)
        tops = tl.where(valid & (s > tops), s, tops)
        sums += _target(y, valid, high, alpha, 1.0, target)
    top, norm = tl.max(tops, 0), tl.sum(sums, 0)
    top = tl.where(count > 0, top, 0.0)
    # q = weight * f(label): the normaliser of the targets, 0 for labels that sum to 0 or less
    whole = tl.where(norm > 0.0, norm, 1.0)
    weight = tl.where(norm > 0.0, 1.0 / whole, 0.0)
    weight = tl.where(target == NONE, 1.0, weight)
    if FAMILY == "nca":
        share = 1.0 / tl.maximum(count, 1).to(tl.float64)
        total = zero
        for r in range(0, size, BLOCK):
            i = r + tl.arange(0, BLOCK)
            s, y, valid = load_items(scores, labels, start, i, size)
            q = _target(y, valid, high, alpha, weight, target)
            value, down = logistic(s)  # softplus(-s), sigmoid(-s)
            other, up = logistic(-s)
            total += tl.where(valid, q * value + share * other, 0.0)
            store_items(slope, start, i, size, share * up - q * down, valid, broken)
        store_loss(loss, g, tl.sum(total, 0), broken)
    else:
        # the first item of the greatest score; the others' part of the sum is all that LSE - top is
        firsts = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
        for r in range(0, size, BLOCK):
            i = r + tl.arange(0, BLOCK)
            s, _, valid = load_items(scores, labels, start, i, size)
            firsts = tl.where(valid & (s == top) & (i < firsts), i, firsts)
        best = tl.min(firsts, 0)
        rests = zero
        for r in range(0, size, BLOCK):
            i = r + tl.arange(0, BLOCK)
            s, _, valid = load_items(scores, labels, start, i, size)
            e = tl.exp(tl.where(valid, s - top, -float("inf")))
            rests += tl.where(i != best, e, 0.0)
        rest = tl.sum(rests, 0)
        excess = log1p(rest)
        total = zero
        for r in range(0, size, BLOCK):
            i = r + tl.arange(0, BLOCK)
            s_i, y_i, v_i = load_items(scores, labels, start, i, size)
            q_i = _target(y_i, v_i, high, alpha, weight, target)
            c_i = tl.exp(tl.where(v_i, s_i - top, -float("inf")))
            # u_i = c_i (sum of the other q) - q_i (sum of the other c): no difference 1 - c_i
            other_q, other_c = zero, zero
            for c in range(0, size, BLOCK):
                j = c + tl.arange(0, BLOCK)
                s_j, y_j, v_j = load_items(scores, labels, start, j, size)
                q_j = _target(y_j, v_j, high, alpha, weight, target)
                c_j = tl.exp(tl.where(v_j, s_j - top, -float("inf")))
                other = i[:, None] != j[None, :]
                other_q += tl.sum(tl.where(other, q_j[None, :], 0.0), 1)
                other_c += tl.sum(tl.where(other, c_j[None, :], 0.0), 1)
            u = (c_i * other_q - q_i * other_c) / (1.0 + rest)
            total += tl.where(v_i, q_i * (excess + (top - s_i)), 0.0)
            store_items(slope, start, i, size, u, v_i, broken)
        store_loss(loss, g, tl.sum(total, 0), broken)


@triton.jit(do_not_specialize=["narrow"])
def list_contrast_kernel(
    scores,  # [S] fp64
    labels,  # [S] fp64
    cu_groups,  # [G+1] int32
    number,  # [1] fp64: deviation
    loss,  # [G] fp64
    slope,  # [S] fp64
    narrow,  # 1: the labels came as fp32
    BLOCK: tl.constexpr,
):
    """set_contrast: l = softplus(LSE(x over Y-) - LSE(x over Y+)), x = s + deviation |y - mean|."""
    g = tl.program_id(0)
    start = tl.load(cu_groups + g).to(tl.int64)
    size = (tl.load(cu_groups + g + 1) - start).to(tl.int32)
    count, broken, low, high = group_facts(scores, labels, start, size, BLOCK)
    deviation = tl.load(number)
    items = tl.maximum(count, 1).to(tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    for r in range(0, size, BLOCK):
        _, y, _ = load_items(scores, labels, start, r + tl.arange(0, BLOCK), size)
        sums += y
    mean = tl.sum(sums, 0) / items
    sums = tl.zeros((BLOCK,), tl.float64)
    for r in range(0, size, BLOCK):
        _, y, valid = load_items(scores, labels, start, r + tl.arange(0, BLOCK), size)
        sums += tl.where(valid, y - mean, 0.0)
    # The mean to the last bit, then of the labels' own precision: a label that ties with it
    # belongs to Y-, and 0.5 among 0.9, 0.5 and 0.1 ties with their mean in fp32 alone.
    mean += tl.sum(sums, 0) / items
    mean = tl.where(narrow != 0, mean.to(tl.float32).to(tl.float64), mean)
    top_good = tl.full((BLOCK,), -float("inf"), tl.float64)
    top_bad = tl.full((BLOCK,), -float("inf"), tl.float64)
    for r in range(0, size, BLOCK):
        s, y, valid = load_items(scores, labels, start, r + tl.arange(0, BLOCK), size)
        x = s + deviation * tl.abs(y - mean)
        good = y > mean
        top_good = tl.where(valid & good & (x > top_good), x, top_good)
        top_bad = tl.where(valid & (y <= mean) & (x > top_bad), x, top_bad)
    best, worst = tl.max(top_good, 0), tl.max(top_bad, 0)
    # A mean of equal labels may be off by rounding; a side must hold a real difference.
    real = (high > low) & (best > -float("inf")) & (worst > -float("inf"))
    best, worst = tl.where(real, best, 0.0), tl.where(real, worst, 0.0)
    sum_good = tl.zeros((BLOCK,), tl.float64)
    sum_bad = tl.zeros((BLOCK,), tl.float64)
    for r in range(0, size, BLOCK):
        s, y, valid = load_items(scores, labels, start, r + tl.arange(0, BLOCK), size)
        good = y > mean
        x = s + deviation * tl.abs(y - mean) - tl.where(good, best, worst)
        e = tl.exp(tl.where(valid, x, -float("inf")))
        sum_good += tl.where(good, e, 0.0)
        sum_bad += tl.where(good, 0.0, e)
    among_good, among_bad = tl.sum(sum_good, 0), tl.sum(sum_bad, 0)
    among_good, among_bad = tl.where(real, among_good, 1.0), tl.where(real, among_bad, 1.0)
    margin = tl.log(among_good) - tl.log(among_bad) + (best - worst)
    value, lost = logistic(margin)  # lost: mass of Y-
    store_loss(loss, g, tl.where(real, value, 0.0), broken)
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        s, y, valid = load_items(scores, labels, start, i, size)
        good = y > mean
        x = s + deviation * tl.abs(y - mean) - tl.where(good, best, worst)
        e = tl.exp(tl.where(valid, x, -float("inf"))) * lost
        u = tl.where(real, tl.where(good, -e / among_good, e / among_bad), 0.0)
        store_items(slope, start, i, size, u, valid, broken)


@triton.jit(do_not_specialize=["inner_mean"])
def list_anchor_kernel(
    scores,  # [S] fp64
    labels,  # [S] fp64
    cu_groups,  # [G+1] int32
    scratch,  # [1, S] fp64: weight of an anchor on each of its lower items
    loss,  # [G] fp64
    slope,  # [S] fp64
    inner_mean,
    BLOCK: tl.constexpr,
):
    """anchor: l = sum_i m_i [softplus(-s_i) + c_i sum_{y_j < y_i} softplus(s_j)], m constant."""
    g = tl.program_id(0)
    start = tl.load(cu_groups + g).to(tl.int64)
    size = (tl.load(cu_groups + g + 1) - start).to(tl.int32)
    count, broken, low, high = group_facts(scores, labels, start, size, BLOCK)
    lows = tl.full((BLOCK,), float("inf"), tl.float64)
    highs = tl.full((BLOCK,), -float("inf"), tl.float64)
    for r in range(0, size, BLOCK):
        s, _, valid = load_items(scores, labels, start, r + tl.arange(0, BLOCK), size)
        lows = tl.where(valid & (s < lows), s, lows)
        highs = tl.where(valid & (s > highs), s, highs)
    least = tl.min(lows, 0)
    span = tl.max(highs, 0) - least
    per = 1.0 / tl.maximum(count - 1, 1).to(tl.float64)
    per = tl.where(high > low, per, 0.0)  # equal labels: nothing to anchor
    total = tl.zeros((BLOCK,), tl.float64)
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        s_i, y_i, v_i = load_items(scores, labels, start, i, size)
        rank = rank_of(scores, labels, start, size, y_i, i, False, BLOCK)
        lower = tl.zeros((BLOCK,), tl.float64)
        for c in range(0, size, BLOCK):
            _, y_j, v_j = load_items(scores, labels, start, c + tl.arange(0, BLOCK), size)
            lower += tl.sum(((y_j[None, :] < y_i[:, None]) & v_j[None, :]).to(tl.float64), 1)
        mu = tl.where(span > 0.0, (s_i - least) / tl.where(span > 0.0, span, 1.0), 1.0) * per
        mu = tl.where(v_i & (rank < count), mu, 0.0)
        value, _ = logistic(s_i)
        total += mu * value
        push = tl.where(inner_mean != 0, mu / tl.maximum(lower, 1.0), mu)
        tl.store(scratch + start + i, push, mask=i < size)
    tl.debug_barrier()
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        s_i, y_i, v_i = load_items(scores, labels, start, i, size)
        rank = rank_of(scores, labels, start, size, y_i, i, False, BLOCK)
        push = tl.zeros((BLOCK,), tl.float64)
        for c in range(0, size, BLOCK):
            j = c + tl.arange(0, BLOCK)
            _, y_j, v_j = load_items(scores, labels, start, j, size)
            p_j = tl.load(scratch + start + j, mask=j < size, other=0.0)
            over = (y_j[None, :] > y_i[:, None]) & v_j[None, :]
            push += tl.sum(tl.where(over, p_j[None, :], 0.0), 1)
        mu = tl.where(span > 0.0, (s_i - least) / tl.where(span > 0.0, span, 1.0), 1.0) * per
        mu = tl.where(v_i & (rank < count), mu, 0.0)
        other, up = logistic(-s_i)
        _, down = logistic(s_i)
        total += tl.where(v_i, push * other, 0.0)
        store_items(slope, start, i, size, push * up - mu * down, v_i, broken)
    store_loss(loss, g, tl.sum(total, 0), broken)


@triton.jit
def list_ndcg_kernel(
    scores,  # [S] fp64
    labels,  # [S] fp64
    cu_groups,  # [G+1] int32
    number,  # [1] fp64: temperature
    scratch,  # [1, S] fp64: pull of an item's gain on its soft rank
    loss,  # [G] fp64
    slope,  # [S] fp64
    BLOCK: tl.constexpr,
):
    """approx_ndcg: l = -sum_i G_i / Z / log2(1 + r_i), r_i = 1 + sum_j sigmoid((s_j - s_i) / T)."""
    g = tl.program_id(0)
    start = tl.load(cu_groups + g).to(tl.int64)
    size = (tl.load(cu_groups + g + 1) - start).to(tl.int32)
    _count, broken, low, high = group_facts(scores, labels, start, size, BLOCK)
    width = tl.load(number)
    base = log_base(True)
    ideals = tl.zeros((BLOCK,), tl.float64)
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        _, y, valid = load_items(scores, labels, start, i, size)
        rank = rank_of(scores, labels, start, size, y, i, False, BLOCK)
        ideals += tl.where(valid, exp2m1(y) * discount(rank, base, 0), 0.0)
    ideal = tl.sum(ideals, 0)
    real = (ideal != 0.0) & (high > low)
    ideal = tl.where(real, ideal, 1.0)
    total = tl.zeros((BLOCK,), tl.float64)
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        s_i, y_i, v_i = load_items(scores, labels, start, i, size)
        soft = tl.full((BLOCK,), 1.0, tl.float64)
        for c in range(0, size, BLOCK):
            j = c + tl.arange(0, BLOCK)
            s_j, _, v_j = load_items(scores, labels, start, j, size)
            other = v_i[:, None] & v_j[None, :] & (i[:, None] != j[None, :])
            _, chance = logistic((s_i[:, None] - s_j[None, :]) / width)
            soft += tl.sum(tl.where(other, chance, 0.0), 1)
        share = tl.where(real, tl.where(v_i, exp2m1(y_i) / ideal * LN2, 0.0), 0.0)
        log = tl.log(1.0 + soft)
        total -= share / log
        tl.store(scratch + start + i, share / ((1.0 + soft) * log * log), mask=i < size)
    store_loss(loss, g, tl.sum(total, 0), broken)
    tl.debug_barrier()
    for r in range(0, size, BLOCK):
        i = r + tl.arange(0, BLOCK)
        s_i, _, v_i = load_items(scores, labels, start, i, size)
        pull_i = tl.load(scratch + start + i, mask=i < size, other=0.0)
        u = tl.zeros((BLOCK,), tl.float64)
        for c in range(0, size, BLOCK):
            j = c + tl.arange(0, BLOCK)
            s_j, _, v_j = load_items(scores, labels, start, j, size)
            pull_j = tl.load(scratch + start + j, mask=j < size, other=0.0)
            other = v_i[:, None] & v_j[None, :] & (i[:, None] != j[None, :])
            e = tl.exp(-tl.abs((s_i[:, None] - s_j[None, :]) / width))
            slope_ij = e / ((1.0 + e) * (1.0 + e))
            u += tl.sum(tl.where(other, slope_ij * (pull_j[None, :] - pull_i[:, None]), 0.0), 1)
        store_items(slope, start, i, size, u / width, v_i, broken)
