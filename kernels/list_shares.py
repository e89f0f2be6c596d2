"""softmax: cross-entropy of a group's softmax with targets made from its labels."""

from __future__ import annotations

import triton
import triton.language as tl

from .list_blocks import (
    group_facts,
    load_items,
    log1p,
    store_items,
    store_loss,
    zero_outside,
)

# What the targets q are made of: softmax(label / alpha), shares of the sum, labels as they are.
SOFTMAX, SUM, NONE = (tl.constexpr(code) for code in range(3))


@triton.jit
def _target(y, valid, high, alpha, weight, target):
    raw = tl.exp(tl.where(valid, y / alpha - high / alpha, -float("inf")))
    return tl.where(valid, tl.where(target == SOFTMAX, raw, y) * weight, 0.0)


@triton.jit(do_not_specialize=["items", "target"])
def list_shares_kernel(
    scores,  # [S] fp64
    labels,  # [S] fp64
    cu_groups,  # [G+1] int32
    number,  # [1] fp64: temperature alpha of softmax targets
    loss,  # [G] fp64
    slope,  # [S] fp64
    items: tl.int64,  # S
    target,
    BLOCK: tl.constexpr,
):
    """l = sum_i q_i (LSE(s) - s_i)."""
    g = tl.program_id(0)
    start = tl.load(cu_groups + g).to(tl.int64)
    size = (tl.load(cu_groups + g + 1) - start).to(tl.int32)
    count, broken, high = group_facts(scores, labels, start, size, BLOCK)
    zero_outside(slope, cu_groups, items, BLOCK)
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
