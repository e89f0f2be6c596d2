"""Self-refined labels (SPA, "Selfie"): pairs the de-coupled model doubts get a softened label."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import surrogates
from ...types import Loss, SeqStats
from .. import core


def selfie(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    mix_chosen_logps: Tensor,  # [P]
    mix_rejected_logps: Tensor,  # [P]
    beta: float = 0.1,
    alpha: float = 0.1,
    threshold: float = 0.0,
) -> Tensor:  # [P]
    """SPA: DPO whose label is 1 - alpha where a mixed model's margin is below a threshold.

    l = q softplus(-m) + (1 - q) softplus(m),  m = beta (logratio(chosen) - logratio(rejected)),
    q = 1 - alpha where c <= threshold, else 1,
    c = beta [(h(chosen) - ref(chosen)) - (h(rejected) - ref(rejected))]

    Kim et al. 2024 (arXiv 2406.04412), as in the authors' code. h is the summed log-probability
    under logits mixed from policy and reference.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        mix_chosen_logps: `[P]` h of the chosen answer. Constant; the policy's logp is mixture 1.
        mix_rejected_logps: `[P]` h of the rejected answer.
        beta: Strength of the pull to the reference, > 0, default 0.1.
        alpha: Doubt about a flagged label, in [0, 0.5], default 0.1.
        threshold: Margin at or below which a pair is flagged, default 0.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, alpha outside [0, 0.5], shapes that differ.
    """
    core.positive("beta", beta)
    if not 0.0 <= alpha <= 0.5:
        raise ValueError(f"alpha must be in [0, 0.5], got {alpha}.")
    margin = beta * core.logratio_gap(chosen, rejected)
    mixed = core.data("mix_chosen_logps", mix_chosen_logps, margin) - chosen.require("ref_logp")
    other = core.data("mix_rejected_logps", mix_rejected_logps, margin) - rejected.require(
        "ref_logp"
    )
    mixed = mixed - other
    q = torch.where(beta * mixed <= threshold, 1.0 - alpha, torch.ones_like(margin))
    return surrogates.logistic(margin, q, 1.0 - q)


SELFIE = Loss(
    selfie,
    "selfie",
    "pairwise",
    needs_reference=True,
    extra=("mix_chosen_logps", "mix_rejected_logps"),
    status="loss checked against the authors' code",
    source="arXiv 2406.04412",
    rewards=core.logratio_rewards,
)
