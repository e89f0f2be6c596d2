"""KTO: unpaired answers judged good or bad, measured against a KL baseline of the batch."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pointwise
from ..record import callers_level


@pointwise(source="arXiv 2402.01306 eq. 7", status="checked against HALOs and TRL", reference=True)
def kto(
    seq: SeqStats,
    *,
    desirable: Tensor,  # [S] bool
    kl_baseline: float | Tensor,  # []
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:  # [S]
    """KTO: a saturating gain for good answers above the baseline and bad answers below it.

    l = desirable_weight sigmoid(-beta (a - z))      where desirable,
    l = undesirable_weight sigmoid(beta (a - z))     elsewhere,  a = logratio

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7. The baseline z is a constant; see
    `kl_baseline`.

    Args:
        kl_baseline: z >= 0 in nats, a number or 0-d tensor, without gradient:
            prefkern.losses.pointwise.kto.kl_baseline(mismatched).

    Returns:
        Unreduced loss `[S]`; its mean runs over all rows of the batch, both labels together.
    """
    core.positive("beta", beta)
    if desirable_weight < 0 or undesirable_weight < 0:
        raise ValueError(
            f"desirable_weight and undesirable_weight must be >= 0, got {desirable_weight} and "
            f"{undesirable_weight}."
        )
    margin = beta * (seq.logratio - core.scalar("kl_baseline", kl_baseline, seq.logratio))
    desirable = core.boolean("desirable", desirable, margin)
    good = desirable_weight * links.zero_one(margin)
    bad = undesirable_weight * links.zero_one(-margin)
    return torch.where(desirable, good, bad)


def kl_baseline(mismatched: SeqStats) -> Tensor:  # []
    """The baseline z = max(0, mean log-ratio) of prompts paired with other prompts' answers.

    Args:
        mismatched: Statistics of prompt i with the answer of prompt i - 1 of the same batch, each
            field `[S]`, computed without gradient. Average over all data-parallel ranks by giving
            the mean of their log-ratios before the clamp: pass the gathered rows.

    Returns:
        0-d tensor without gradient. One row warns: its answer can only be its own.
    """
    logratio = mismatched.logratio.detach()
    if logratio.numel() == 0:
        raise ValueError("the KL baseline needs at least one mismatched answer, got none.")
    if logratio.numel() == 1:
        warnings.warn(
            "KTO's baseline comes from a single row, so the mismatched answer is the row's own and "
            "the baseline equals its log-ratio; use a micro-batch of at least 2.",
            stacklevel=callers_level(),
        )
    return logratio.mean().clamp(min=0.0)
