"""InfiFPO: length-normalised DPO against a reference fused from several models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


def _rewards(seq: SeqStats, *, beta: float, **_: Any) -> Tensor:
    """Over the pivot: the fused reference is known per pair only."""
    return beta * seq.mean_logratio


@pairwise(
    source="arXiv 2505.13878 eq. 10-13",
    status="paper read; two points left open by it; trainer not released",
    reference=True,
    reads=("logp", "length"),
    score="mean_logp",
    rewards=_rewards,
)
def infifpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    source_chosen_mean_logps: Tensor,  # [P, M]
    source_rejected_mean_logps: Tensor,  # [P, M]
    beta: float = 2.5,
    fusion: str = "max_margin",
) -> Tensor:  # [P]
    """InfiFPO: the margin of mean log-probabilities over what the best of several models gives.

    l = softplus(-beta [(a(chosen) - f(chosen)) - (a(rejected) - f(rejected))]),  a = mean_logp

    with f the fused reference of `fused_reference`.

    Gu et al. 2025 (arXiv 2505.13878), eq. 10-13. The paper leaves open whether the choice is made
    before or after clipping and against which pivot: here after, against the initial one.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `logp`, `ref_logp`
            (the policy at its start, the pivot) and `length`.
        source_chosen_mean_logps: `[P, M]` mean log-probability of the chosen answer under M source
            models, each over its own tokens. Constant.
        source_rejected_mean_logps: `[P, M]` the same for the rejected answer.
        beta: Strength of the pull to the fused reference, > 0.
        fusion: "max_margin" (paper) or "mean" (what the released script takes).
    """
    core.positive("beta", beta)
    core.same_items(chosen, rejected)
    margins = []
    for name, seq, sources, side in (
        ("source_chosen_mean_logps", chosen, source_chosen_mean_logps, "chosen"),
        ("source_rejected_mean_logps", rejected, source_rejected_mean_logps, "rejected"),
    ):
        tokens = seq.require("length").clamp(min=1)
        mean, pivot = seq.require("logp") / tokens, seq.require("ref_logp").detach() / tokens
        if not isinstance(sources, Tensor) or sources.dim() != 2 or len(sources) != len(pivot):
            got = list(sources.shape) if isinstance(sources, Tensor) else type(sources).__name__
            raise ValueError(f"{name} must be [P, M] = [{len(pivot)}, models], got {got}.")
        core.real(name, sources)
        sources = sources.detach().to(pivot.dtype)
        margins.append(mean - fused_reference(pivot, sources, side, fusion))
    return links.logistic(beta * core.difference(*margins))


def fused_reference(
    pivot: Tensor,  # [P]
    sources: Tensor,  # [P, M]
    side: str,
    fusion: str = "max_margin",
) -> Tensor:  # [P]
    """One reference from several models' mean log-probabilities.

    Sources are clipped against the pivot, max(source, pivot) for chosen answers and min for
    rejected ones; then "max_margin" takes the one farthest from the pivot and "mean" the average.

    Args:
        pivot: `[P]` mean log-probability under the policy at its start.
        sources: `[P, M]` the same under M >= 1 other models.
        side: "chosen" or "rejected".
        fusion: "max_margin" or "mean", default "max_margin".

    Returns:
        `[P]`, without gradient.
    """
    core.choice("side", side, ("chosen", "rejected"))
    core.choice("fusion", fusion, ("max_margin", "mean"))
    if sources.shape[1] == 0:
        raise ValueError("a fused reference needs at least one source model, got [P, 0].")
    sources, pivot = sources.detach(), pivot.detach()
    pick = torch.maximum if side == "chosen" else torch.minimum
    if fusion == "mean":
        return pick(sources, pivot[:, None]).mean(1)
    # the best of the clipped ones is the best one clipped, which needs no second [P, M]
    return pick(sources.amax(1) if side == "chosen" else sources.amin(1), pivot)
