"""Multimodal DPO (mDPO, Re-Align): a third answer row conditioned on a corrupted image."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..record import Part


@pairwise(
    source="arXiv 2406.11839, arXiv 2502.13146",
    status="checked against the authors' code",
    reference=True,
    parts=(Part("images", "a text stands in the place of the image", "--image-column"),),
)
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
        cond: Statistics of the chosen text given the corrupted or retrieved image, each field
            `[P]`.
        delta: Anchor of the chosen reward.
        w_text: Weight of the text term.
        w_visual: Weight of the image term.
        w_anchor: Weight of the anchor.
    """
    core.positive("beta", beta)
    for name, weight in (("w_text", w_text), ("w_visual", w_visual), ("w_anchor", w_anchor)):
        core.not_negative(name, weight)
    text = links.logistic(beta * core.logratio_gap(chosen, rejected))
    visual = links.logistic(beta * core.logratio_gap(chosen, cond))
    anchor = links.logistic(beta * chosen.logratio - delta)
    return w_text * text + w_visual * visual + w_anchor * anchor
