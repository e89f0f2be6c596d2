"""TBPO: a Bregman divergence fits the ratio of the two answers at every token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ...ops import ragged
from ...ops.segment_sum import segment_sum
from ...stats import TokenStats
from .. import core
from .. import tokens as token
from ..declare import tokenwise

GENERATORS = ("sba", "ba", "kliep", "lsif", "logistic")


def _reads(advantage: bool = False, **_: object) -> tuple[str, ...]:
    return ("logp", "fkl") if advantage else ("logp",)


@tokenwise(
    source="arXiv 2605.12288 eq. 10, Table 2",
    status="Q version and generators read in the authors' code (its lsif departs from its own eq. "
    "10, followed here); A version, empty there, in the code of a later work that extends it "
    "(ARC-BPO); default lam second-hand",
    reference=True,
    reads=_reads,
)
def tbpo(
    tokens: TokenStats,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    scored: Tensor,  # [N]
    cu_groups: Tensor,  # [G+1]
    baseline: Tensor | None = None,  # [N]
    baseline_bound: float = 1.0,
    advantage: bool = False,
    beta: float = 0.1,
    generator: str = "sba",
    lam: float = 0.2,
    scale: float = 4.0,
) -> Tensor:  # [S]
    """TBPO (token-level Bregman preference optimization): divergence of the token ratio R from 1/R.

    l = mean_t h'(R) R - h(R) - h'(1/R),  log R = beta (delta_l,t - delta_w,t + w_t),
    delta = logp - ref_logp,  w = baseline_l,t - baseline_w,t, centred over t and clamped

    over the positions t that both answers have. Constants left out, h gives
        logistic  log(1 + R), DPO's link        kliep  R + log R      lsif  R^2 - 2 / R
        ba        R^(1+lam) - (1+lam)/lam R^-lam                      sba   ba / (scale (1 + lam))

    arXiv 2605.12288. log R is held within +-30. The Q version has a state baseline, a head on the
    policy's detached states. The A version needs none: advantages have mean 0 under the reference,
    which makes w_t = KL_l,t - KL_w,t with KL(reference || policy) of the next token, neither
    centred nor clamped. Without either w is 0.

    Args:
        cu_groups: `[G+1]` boundaries of the pairs, on the sequence axis; the first answer of a
            group is the chosen one, each further one forms a pair with it.
        baseline: `[N]` outputs of the baseline head, with gradient; None leaves it out.
        baseline_bound: |w| is clamped to it, > 0.
        advantage: The A version, with the statistic fkl and its gradient; excludes `baseline`.
        beta: > 0.
        generator: "sba", "ba", "kliep", "lsif" or "logistic".
        lam: Power of ba and sba, > -1 and not 0 (kliep is its limit).
        scale: s of sba, > 0; at 4 the slope at R = 1 is DPO's.

    Returns:
        `[S]` fp64: the mean over sequences is the mean over pairs in groups of two. An answer
        without a partner at any position has loss 0.
    """
    core.positive("beta", beta)
    core.positive("scale", scale)
    core.positive("baseline_bound", baseline_bound)
    core.choice("generator", generator, GENERATORS)
    if lam <= -1.0 or lam == 0.0:
        raise ValueError(f"lam must be > -1 and not 0 (generator='kliep' is 0), got {lam}.")
    delta = token.field(tokens, "logp", scored) - token.field(tokens, "ref_logp", scored)
    delta = delta.double()
    if advantage:
        if baseline is not None:
            raise ValueError("advantage=True is the version without a baseline; pass one of both.")
        delta = delta + token.field(tokens, "fkl", scored).double()
    partner, aligned = _partners(scored, cu_seqlens, cu_groups)
    shared = token.count(aligned, cu_seqlens).clamp(min=1.0)  # [S]
    log_ratio = delta - delta[partner]
    if baseline is not None:
        core.same_shape("baseline", baseline, "scored", scored)
        core.real("baseline", baseline)
        w = torch.where(aligned, baseline.double() - baseline.double()[partner], 0.0)
        owner = ragged.owner(cu_seqlens, scored.numel())
        w = w - (segment_sum(w, cu_seqlens) / shared)[owner]
        log_ratio = log_ratio + w.clamp(-baseline_bound, baseline_bound)
    risk = _risk(generator, (beta * log_ratio).clamp(-30.0, 30.0), lam, scale)
    pair = segment_sum(torch.where(aligned, risk, 0.0), cu_seqlens) / shared  # 0 for a first answer
    pairs = (cu_groups.diff() - 1).clamp(min=1)
    group = ragged.owner(cu_groups, pair.numel())
    total = torch.zeros_like(pairs, dtype=pair.dtype).index_add(0, group, pair)
    return (total / pairs)[group]


def _risk(generator: str, z: Tensor, lam: float, scale: float) -> Tensor:
    """h'(R) R - h(R) - h'(1/R) at R = e^z, less constants."""
    if generator == "logistic":
        return softplus(z)
    if generator == "kliep":
        return z.exp() + z
    if generator == "lsif":
        return (2.0 * z).exp() - 2.0 * (-z).exp()
    risk = ((1.0 + lam) * z).exp() - (1.0 + lam) / lam * (-lam * z).exp()
    return risk if generator == "ba" else risk / (scale * (1.0 + lam))


def _partners(
    scored: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    cu_groups: Tensor,  # [G+1]
) -> tuple[Tensor, Tensor]:
    """For the t-th scored token of a further answer the place of the t-th of its group's first one
    `[N]`, and where there is such a token `[N]` bool."""
    n = scored.numel()
    so_far = scored.long().cumsum(0)  # this token included
    before = torch.cat([so_far.new_zeros(1), so_far])[cu_seqlens.long()]  # [S+1]
    sequence = ragged.owner(cu_seqlens, n)
    group = ragged.owner(cu_groups, cu_seqlens.numel() - 1)  # [S]
    first = cu_groups.long()[group][sequence]  # [N] the group's first sequence
    ordinal = so_far - before[sequence]  # from 1
    aligned = scored & (first != sequence) & (ordinal <= before[first + 1] - before[first])
    place = torch.searchsorted(so_far, before[first] + ordinal).clamp(max=max(n - 1, 0))
    return torch.where(aligned, place, 0), aligned
