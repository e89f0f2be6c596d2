"""SmPO-Diffusion: Diffusion-DPO whose strength follows how clear the preference is."""

from __future__ import annotations

from torch import Tensor

from .. import core, links
from ..declare import diffusion
from . import errors


@diffusion(source="arXiv 2506.02698", status="code read, equation from a summary", reference=True)
def smpo(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    ref_chosen_err: Tensor,  # [P]
    ref_rejected_err: Tensor,  # [P]
    *,
    p_win: Tensor,  # [P]
    beta: float = 2000.0,
    gamma: float = 10.0,
) -> Tensor:  # [P]
    """Smoothed preference optimization: the margin is scaled by gamma (2 p - 1).

    l = softplus(gamma (2 p - 1) beta / 2 Delta),  Delta as in diff_dpo

    arXiv 2506.02698, with the 1/2 of the authors' code. The released code takes the
    first pair's p for the whole micro-batch; here every pair has its own. p = 1/2 gives log 2 and
    no gradient. Errors are means; noise comes from an inversion of the image.

    Args:
        p_win: `[P]` probability that the chosen image is the better one, a softmax over the two
            normalised rewards. Constant.
        beta: Strength of the pull to the reference, > 0; 2000 for SD 1.5, 5000 for SDXL.
        gamma: Scale of the preference, > 0.
    """
    core.positive("beta", beta)
    core.positive("gamma", gamma)
    errors.one_per_sample("chosen_err", chosen_err)
    delta = errors.gap(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err)
    strength = gamma * (2.0 * core.data("p_win", p_win, delta) - 1.0)
    return links.logistic(-0.5 * beta * strength * delta)
