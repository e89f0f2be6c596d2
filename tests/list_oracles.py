"""list_rank's families by loops over items in plain Python, and ragged groups to run them on."""

from __future__ import annotations

import itertools
import math

import torch

from prefkern.backends.list_options import ListOptions

VARIANTS = [
    ("pair", {}),
    ("pair", {"weights": "labeldiff", "pair_reduction": "mean"}),
    ("pair", {"weights": "lambda"}),
    ("pair", {"weights": "lambda", "tie_rank": "average", "log_base": "2", "topn": 2}),
    ("pair", {"weights": "lambda", "rank_source": "label", "gain": "linear", "normalize": True}),
    ("pair", {"weights": "lambda", "form": "dcg2", "scale_by_list_size": True}),
    ("plackett_luce", {}),
    ("plackett_luce", {"ties": "stable", "topk": 2}),
    ("plackett_luce", {"ties": "breslow", "item_gain": "exp2"}),
    ("softmax", {"target": "sum"}),
    ("softmax", {"target": "none"}),
    ("softmax", {"target": "softmax", "alpha": 0.5}),
]
IDS = ["-".join([f, *map(str, o.values())]) for f, o in VARIANTS]


def lse(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def ranks(values):
    """1-based, descending, equal values by position."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return {item: r + 1 for r, item in enumerate(order)}


def oracle(s, y, family, topk=None, **options):
    """Loss of one group by loops over its items; masked items are dropped first."""
    o = ListOptions(**options)
    keep = [i for i in range(len(s)) if not math.isnan(y[i])]
    s, y = [s[i] for i in keep], [y[i] for i in keep]
    k = len(s)
    if k == 0:
        return 0.0
    strict = [(i, j) for i in range(k) for j in range(k) if y[i] > y[j]]
    size = (k if o.scale_by_list_size else 1) / (
        max(len(strict), 1) if o.pair_reduction == "mean" else 1
    )
    log = math.log2 if o.log_base == "2" else math.log
    if family == "pair":
        rank = ranks(s if o.rank_source == "score" else y)

        def disc(r):
            return 0.0 if o.topn and r > o.topn else 1 / log(1 + r)

        def place(i):
            source = s if o.rank_source == "score" else y
            block = (
                [j for j in range(k) if source[j] == source[i]] if o.tie_rank == "average" else [i]
            )
            return sum(disc(rank[j]) for j in block) / len(block)

        def gain(v):
            return 2.0**v - 1 if o.gain == "exp2" else v

        ideal = 1.0
        if o.normalize:
            ideal = sum(gain(y[i]) * disc(r) for i, r in ranks(y).items()) or 1.0
        total = 0.0
        for i, j in strict:
            weight = 1.0
            if o.weights == "labeldiff":
                weight = abs(y[i] - y[j])
            elif o.weights == "lambda" and o.form == "dcg2":
                apart = abs(rank[i] - rank[j])
                weight = abs(gain(y[i]) - gain(y[j])) * abs(disc(apart) - disc(apart + 1))
            elif o.weights == "lambda":
                weight = abs(gain(y[i]) - gain(y[j])) / ideal * abs(place(i) - place(j))
            total += weight * softplus(-(s[i] - s[j]))
        return size * total
    if family == "plackett_luce":
        rank = ranks(y)
        total = 0.0
        for i in range(k):
            place = rank[i] if o.ties == "stable" else 1 + sum(y[j] > y[i] for j in range(k))
            if topk is not None and place > topk:
                continue
            if o.ties == "stable":
                risk = [s[j] for j in range(k) if rank[j] >= rank[i]]
            elif o.ties == "breslow":
                risk = [s[j] for j in range(k) if y[j] <= y[i]]
            else:
                risk = [s[i]] + [s[j] for j in range(k) if y[j] < y[i]]
            total += (2.0 ** y[i] - 1 if o.item_gain == "exp2" else 1.0) * (lse(risk) - s[i])
        return total
    if o.target == "softmax":
        norm = lse([v / o.alpha for v in y])
        q = [math.exp(v / o.alpha - norm) for v in y]
    else:
        whole = sum(y) if o.target == "sum" else 1.0
        q = [v / whole if whole > 0 else 0.0 for v in y]
    return sum(w * (lse(s) - v) for w, v in zip(q, s, strict=True))


def oracle_slope(s, y, family, **options):
    """Central differences of the oracle."""
    step, slope = 1e-5, []
    for i in range(len(s)):
        ends = []
        for d in (step, -step):
            moved = list(s)
            moved[i] += d
            ends.append(oracle(moved, y, family, **options))
        slope.append((ends[0] - ends[1]) / (2 * step))
    return slope


def ragged(sizes, seed=0, tied_scores=False, masked=False):
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = torch.randn(n, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 4, (n,), generator=g).double() / 2
    if tied_scores:
        scores = torch.zeros_like(scores)
    if masked:
        labels[torch.rand(n, generator=g) < 0.3] = torch.nan
    cu = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    return scores.requires_grad_(), labels, cu
