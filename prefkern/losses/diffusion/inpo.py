"""DDIM-InPO: Diffusion-DPO at latents that come from inverting the image."""

from __future__ import annotations

from torch import Tensor

from ..declare import diffusion
from .diff_dpo import under_beta


@diffusion(source="arXiv 2503.18454", status="code read", reference=True)
def inpo(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    ref_chosen_err: Tensor,  # [P]
    ref_rejected_err: Tensor,  # [P]
    *,
    beta: float = 2000.0,
) -> Tensor:  # [P]
    """Inversion preference optimization: the loss of Diffusion-DPO on inverted latents.

    l = softplus(beta / 2 Delta),  Delta as in diff_dpo

    arXiv 2503.18454. What differs lies before the errors: x_t is the DDIM inversion
    of the image (10 steps) instead of fresh noise, and the target follows from it,
    (x_t - sqrt(abar) x_0) / sqrt(1 - abar). Errors are means.

    Args:
        beta: Strength of the pull to the reference, > 0; 2000 for SD 1.5, 5000 for SDXL.
    """
    return under_beta(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err, beta)
