"""Rows as a trained model has them: certain, undecided and flat ones, in stated proportions.

What a backward may leave out depends on how a row's probability lies over the vocabulary, and real
batches mix kinds of rows, so cases are stated by the share of units needed, not by an entropy. A
unit is one row of one chunk of CHUNK columns. In a row, the chunks of smallest mass whose masses
add up to at most MASS are not needed; the target's chunk always is.

certain    nearly all probability on one token: one unit
undecided  CANDIDATES tokens of about equal probability: as many units as chunks they lie in
flat       logits of standard deviation 2 and nothing else: every unit

Token ids are drawn log-uniformly, since vocabularies list frequent tokens first: the first chunk is
needed by most rows, a late one by few.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

CHUNK, MASS = 1024, 2.0**-8
CANDIDATES = 8
SHARES = (0.05, 0.15, 0.3, 1.0)


def chunks_of(v: int, chunk: int) -> int:
    return -(-v // chunk)


def proportions(v: int, share: float, chunk: int = CHUNK) -> tuple[float, float]:
    """(undecided, flat) parts of the rows that need about `share` of all units; the rest is
    certain, which needs 1 / chunks of them: no mixture needs less."""
    count = chunks_of(v, chunk)
    if count == 1:
        return 0.0, share
    edges = [math.log(min(i * chunk, v) + 1) / math.log(v + 1) for i in range(count + 1)]
    lying = (b - a for a, b in itertools.pairwise(edges))
    units = sum(1 - (1 - p) ** CANDIDATES for p in lying)  # chunks that the candidates lie in
    excess = max(share - 1 / count, 0.0)
    undecided = min(0.5 * excess * count / max(units - 1, 1e-9), 0.6 * (1 - share))
    return undecided, min(1.0, (excess - undecided * (units - 1) / count) / (1 - 1 / count))


def rows(
    weight: Tensor,  # [V, D], logits of standard deviation 2 for a standard normal row
    n: int,
    share: float,
    g: torch.Generator,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # [n, D], [n]
    """(hidden states, targets) that need about `share` of the units; D of some hundreds, so that
    tokens can be raised without raising others."""
    (v, d), device = weight.shape, weight.device
    undecided, flat = proportions(v, share, chunk)
    place = torch.rand(n, generator=g, device=device)

    def ids(count: int, each: int) -> Tensor:
        u = torch.rand(count, each, generator=g, device=device)
        return (torch.exp(u * math.log(v + 1)) - 1).long().clamp(0, v - 1)

    hidden = torch.randn(n, d, generator=g, device=device)
    hidden[place >= flat] *= 0.5  # less noise under the raised tokens
    targets = ids(n, 1)[:, 0]
    raised = math.log(v) + 8.5  # far above the logsumexp of the rest, log V + 2 to 4 nats
    for each, kind in (
        (1, place >= flat + undecided),
        (CANDIDATES, (place >= flat) & (place < flat + undecided)),
    ):
        at = kind.nonzero()[:, 0]
        chosen = ids(len(at), each)
        targets[at] = chosen[:, 0]
        w = weight[chosen]  # [k, each, D]
        # the combination of their head rows that gives every one of them the same logit; an id
        # drawn twice is shared by the ridge
        gram = w @ w.mT + 1e-3 * torch.eye(each, device=device)
        wanted = torch.full((len(at), each, 1), raised, device=device)
        hidden[at] += (torch.linalg.solve(gram, wanted).mT @ w)[:, 0]
    return hidden, targets
