"""Diffusion-DPO, and Diffusion-NPO, which is the same loss with the two images exchanged."""

from __future__ import annotations

from torch import Tensor

from .. import core, links
from ..declare import diffusion, formula
from . import errors

KINDS = ("logistic", "hinge", "ipo")


@diffusion(
    source="arXiv 2311.12908 eq. 14",
    status="paper and two codes read; values and gradients checked against our oracle",
    reference=True,
)
def diff_dpo(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    ref_chosen_err: Tensor,  # [P]
    ref_rejected_err: Tensor,  # [P]
    *,
    kappa: float = 2500.0,
    kind: str = "logistic",
) -> Tensor:  # [P]
    """Diffusion-DPO: the logistic loss of how much the policy's errors fall below the reference's.

    l = softplus(kappa Delta),  Delta = (e_w - e_w_ref) - (e_l - e_l_ref)
    hinge: l = max(0, 1 + kappa Delta);  ipo: l = (Delta + 1 / (2 kappa))^2

    Wallace et al. 2023 (arXiv 2311.12908), eq. 14. kappa belongs to the reduction of the errors:
    the paper's are sums, the codes take means (for sums divide kappa by the number of elements).
    With b their beta_dpo, kappa = b / 2 in the authors' code (b = 5000 for SDXL, 2000 for SD 1.5)
    and in diffusers' train_diffusion_dpo_sdxl.py; kappa = b in diffusers' train_diffusion_dpo.py
    (SD 1.5). At policy = reference, l = log 2 and the slope is kappa / 2.

    Args:
        kappa: Scale of Delta, > 0; the default is the authors' for means and SDXL.
        kind: "logistic", "hinge" or "ipo" (variants of diffusers' SD 1.5 script).
    """
    core.positive("kappa", kappa)
    core.choice("kind", kind, KINDS)
    errors.one_per_sample("chosen_err", chosen_err)
    delta = errors.gap(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err)
    if kind == "ipo":
        return links.squared(delta + 0.5 / kappa)
    margin = -kappa * delta
    return links.hinge_loss(margin) if kind == "hinge" else links.logistic(margin)


def under_beta(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    ref_chosen_err: Tensor,  # [P]
    ref_rejected_err: Tensor,  # [P]
    beta: float,
) -> Tensor:  # [P]
    """diff_dpo's formula as its authors' code scales mean errors: kappa = beta / 2."""
    core.positive("beta", beta)
    return formula(diff_dpo)(
        chosen_err, rejected_err, ref_chosen_err, ref_rejected_err, kappa=0.5 * beta
    )


@diffusion(source="arXiv 2505.11245", status="code read", reference=True)
def diff_npo(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    ref_chosen_err: Tensor,  # [P]
    ref_rejected_err: Tensor,  # [P]
    *,
    kappa: float = 2500.0,
) -> Tensor:  # [P]
    """Diffusion-NPO: trains the negative (unconditional) model, which must prefer the worse image.

    l = softplus(-kappa Delta),  Delta as in diff_dpo: the loss of the exchanged pair

    arXiv 2505.11245. At inference the result replaces the unconditional branch
    of classifier-free guidance.

    Args:
        kappa: Scale of Delta for mean errors, > 0; the default is the code's.
    """
    return formula(diff_dpo)(
        rejected_err, chosen_err, ref_rejected_err, ref_chosen_err, kappa=kappa
    )
