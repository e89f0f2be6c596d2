"""DCPO and PPD: Diffusion-DPO's loss where only the conditioning of the errors differs."""

from __future__ import annotations

from torch import Tensor

from .. import core as shared
from ..record import Loss
from . import core
from .diff_dpo import diff_dpo


def dcpo(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    ref_chosen_err: Tensor,  # [P]
    ref_rejected_err: Tensor,  # [P]
    *,
    beta: float = 5000.0,
) -> Tensor:  # [P]
    """Dual-caption preference loss: each image's errors are taken under its own caption.

    l = softplus(beta / 2 Delta),  Delta as in diff_dpo

    After the description of arXiv 2502.06023, whose equations were not read: how the rejected
    image's caption is made and the value of beta are not confirmed. Errors are means.

    Args:
        chosen_err, rejected_err: `[P]` errors of the policy's predictions for the two images.
        ref_chosen_err, ref_rejected_err: `[P]` the reference's, same noise and timesteps. Constant.
        beta: Strength of the pull to the reference, > 0, default 5000 (Diffusion-DPO's).

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ, a reference with gradient.
    """
    shared.positive("beta", beta)
    return diff_dpo(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err, kappa=0.5 * beta)


def ppd(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    ref_chosen_err: Tensor,  # [P]
    ref_rejected_err: Tensor,  # [P]
    *,
    beta: float = 5000.0,
) -> Tensor:  # [P]
    """Personalised preference loss: both models' errors are also conditioned on a user embedding.

    l = softplus(beta / 2 Delta),  Delta as in diff_dpo

    After a summary of arXiv 2501.06655; its beta is not known here. The user embedding enters
    through the model's cross-attention, before the errors. Errors are means.

    Args:
        chosen_err, rejected_err: `[P]` errors of the policy's predictions for the two images.
        ref_chosen_err, ref_rejected_err: `[P]` the reference's, same noise and timesteps. Constant.
        beta: Strength of the pull to the reference, > 0, default 5000 (Diffusion-DPO's).

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ, a reference with gradient.
    """
    return dcpo(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err, beta=beta)


DCPO = Loss(
    dcpo,
    "dcpo",
    "diffusion",
    stats=(),
    needs_reference=True,
    status="provisional: loss of Diffusion-DPO assumed, the paper's equations were not read",
    source="arXiv 2502.06023",
    rewards=core.rewards,
)
PPD = Loss(
    ppd,
    "ppd",
    "diffusion",
    stats=(),
    needs_reference=True,
    status="provisional: from a summary, beta not known",
    source="arXiv 2501.06655",
    rewards=core.rewards,
)
