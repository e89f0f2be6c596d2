"""DCPO and PPD: Diffusion-DPO's loss where only the conditioning of the errors differs."""

from __future__ import annotations

from torch import Tensor

from ..declare import diffusion
from .diff_dpo import under_beta


@diffusion(
    source="arXiv 2502.06023",
    status="confirmed by summaries: Diffusion-DPO with a caption per image; equations not read",
    reference=True,
)
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

    arXiv 2502.06023, whose loss is Diffusion-DPO's with one caption per image. How the rejected
    image's caption is made is up to the data, the value of beta was not read. Errors are means.

    Args:
        beta: Strength of the pull to the reference, > 0; the default is Diffusion-DPO's.
    """
    return under_beta(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err, beta)


@diffusion(
    source="arXiv 2501.06655",
    status="confirmed by summaries: Diffusion-DPO under a user embedding; its beta is not known",
    reference=True,
)
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

    arXiv 2501.06655, whose loss is Diffusion-DPO's with both models conditioned on the user; its
    beta is not known here. The user embedding enters through the model's cross-attention, before
    the errors. Errors are means.

    Args:
        beta: Strength of the pull to the reference, > 0; the default is Diffusion-DPO's.
    """
    return under_beta(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err, beta)
