"""D3PO and SPO: preferences between two denoising steps, each a Gaussian transition."""

from __future__ import annotations

import math

from torch import Tensor

from .. import core, links
from ..declare import diffusion, formula
from . import errors


@diffusion(source="arXiv 2311.13231", status="code read", reference=True)
def d3po(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    ref_chosen_err: Tensor,  # [P]
    ref_rejected_err: Tensor,  # [P]
    *,
    sigma: float | Tensor,  # [P]
    h: Tensor | None = None,  # [P]
    beta: float = 0.1,
    eps: float = 0.1,
) -> Tensor:  # [P]
    """D3PO: logistic loss of the two transitions' clipped log-likelihood ratios.

    l = softplus(-beta h (c(u_w) - c(u_l))),  u = (e_ref - e) / (2 sigma^2),
    c(u) = clamp(u, log(1 - eps), log(1 + eps))

    where e = mean (x' - mu)^2 compares the sampled next latent x' with the mean mu of a transition:
    error_sum(mu, x', mu_ref). The mean over elements stands for the sum, as in the authors' code.

    arXiv 2311.13231. u is clamped itself; the code clamps exp(u) and its gradient
    is NaN once u > 88 in fp32. With both sides clamped the gradient is 0, which is normal.

    Args:
        h: `[P]` +1 where the first sample is preferred, -1 the second, 0 a tie (log 2, no
            gradient); None: all +1.
        beta: Temperature, > 0.
        eps: Clip range in (0, 1).
    """
    core.positive("beta", beta)
    core.positive("sigma", sigma)
    if not 0.0 < eps < 1.0:
        raise ValueError(f"eps must be in (0, 1), got {eps}.")
    errors.one_per_sample("chosen_err", chosen_err)
    precision = 0.5 / core.per_item("sigma", sigma, chosen_err) ** 2
    low, high = math.log1p(-eps), math.log1p(eps)
    u_w = -precision * errors.change(chosen_err, ref_chosen_err, "chosen_err")
    u_l = -precision * errors.change(rejected_err, ref_rejected_err, "rejected_err")
    margin = beta * core.difference(u_w.clamp(low, high), u_l.clamp(low, high))
    return links.logistic(margin if h is None else core.data("h", h, margin) * margin)


@diffusion(source="arXiv 2406.04314", status="code read", reference=True)
def spo_step(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    ref_chosen_err: Tensor,  # [P]
    ref_rejected_err: Tensor,  # [P]
    *,
    sigma: float | Tensor,  # [P]
    beta: float = 10.0,
    eps: float = 0.1,
) -> Tensor:  # [P]
    """Step-aware preference optimization (SPO): D3PO's loss on the best and worst next latent.

    l = softplus(-beta (c(u_w) - c(u_l))),  u and c as in d3po

    arXiv 2406.04314. The pair of a step is the best and the worst of K samples
    (4 for SD 1.5, 2 for SDXL) from the same latent under a step-aware preference model, kept where
    their softmax differs by more than 0.3 (SDXL 0.4); training starts at step 4 of 20.

    Args:
        beta: Temperature, > 0.
        eps: Clip range in (0, 1).
    """
    return formula(d3po)(
        chosen_err,
        rejected_err,
        ref_chosen_err,
        ref_rejected_err,
        sigma=sigma,
        beta=beta,
        eps=eps,
    )
