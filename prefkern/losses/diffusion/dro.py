"""Diffusion-DRO: real images against the policy's own samples, with a hinge."""

from __future__ import annotations

from torch import Tensor

from .. import core, links
from ..declare import diffusion
from . import errors


@diffusion(source="arXiv 2510.18353", status="code read", reference=True)
def dro(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    ref_chosen_err: Tensor,  # [P]
    ref_rejected_err: Tensor,  # [P]
    *,
    margin: float = 0.001,
) -> Tensor:  # [P]
    """Diffusion-DRO: the expert image must gain on the reference more than the policy's sample.

    l = max(0, margin + delta_w - delta_l),  delta = e - e_ref

    arXiv 2510.18353, as in the authors' code: the chosen side is a real image with
    fresh noise, the rejected side a sample of the current policy whose target is the noise the
    policy itself predicted, at the same timestep. Errors are means. The slope at the kink is 0.

    Args:
        margin: Margin in units of the error, >= 0.
    """
    core.not_negative("margin", margin)
    errors.one_per_sample("chosen_err", chosen_err)
    delta = errors.gap(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err)
    return links.hinge_loss(-delta, margin)
