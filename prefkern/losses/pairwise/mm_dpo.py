"""Multimodal DPO (mDPO, Re-Align): a third answer row conditioned on a corrupted image."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


def mm_dpo(
    chosen: SeqStats,
    rejected: SeqStats,
    cond: SeqStats,
    *,
    beta: float = 0.1,
    delta: float = 0.0,
    w_text: float = 1.0,
    w_visual: float = 1.0,
    w_anchor: float = 1.0,
) -> Tensor:  # [P]
    """mDPO: DPO against the rejected text, against the corrupted image, and an anchor.

    l = w_text softplus(-beta (a - b)) + w_visual softplus(-beta (a - c))
        + w_anchor softplus(-(beta a - delta)),  a, b, c = logratio of chosen, rejected, cond

    Wang et al. 2024 (arXiv 2406.11839). w_anchor = 0 is Re-Align (arXiv 2502.13146); only w_visual
    is VDPO.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        cond: Statistics of the chosen text given the corrupted or retrieved image `[P]`.
        beta: Strength of the pull to the reference, > 0, default 0.1.
        delta: Anchor of the chosen reward, default 0.
        w_text: Weight of the text term, default 1.
        w_visual: Weight of the image term, default 1.
        w_anchor: Weight of the anchor, default 1.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    core.positive("beta", beta)
    text = links.logistic(beta * core.logratio_gap(chosen, rejected))
    visual = links.logistic(beta * core.logratio_gap(chosen, cond))
    anchor = links.logistic(beta * chosen.logratio - delta)
    return w_text * text + w_visual * visual + w_anchor * anchor


MM_DPO = Loss(
    mm_dpo,
    "mm_dpo",
    "pairwise",
    needs_reference=True,
    status="checked against the authors' code",
    source="arXiv 2406.11839, arXiv 2502.13146",
    rows=("chosen", "rejected", "cond"),
    rewards=core.logratio_rewards,
)
