"""RankDPO for images: pairs of a ranked group, weighted by gain and discount of the labels."""

from __future__ import annotations

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..declare import diffusion
from . import errors


@diffusion(
    source="arXiv 2410.18013 eq. 5, Algorithm 2",
    status="paper read; beta is not stated in the part read",
    reference=True,
)
def rank_dpo(
    err: Tensor,  # [S]
    ref_err: Tensor,  # [S]
    *,
    phi: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    beta: float = 5000.0,
    log_base: str = "e",
    backend: str = "auto",
) -> Tensor:  # [G]
    """RankDPO: Diffusion-DPO on every strict pair of a group of images of one prompt.

    l = sum_{phi_i > phi_j} w_ij softplus(beta (delta_i - delta_j)),  delta = e - e_ref,
    w_ij = |2^phi_i - 2^phi_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)|

    with tau the rank by phi (not by the current scores, unlike `lipo`).

    arXiv 2410.18013, eq. 5 and Algorithm 2; the printed index condition i > j
    contradicts them. The paper sums the error over elements; for means multiply beta by their
    number.

    Args:
        err: `[S]` error of the policy's prediction for each image.
        ref_err: `[S]` the reference's. Constant.
        phi: `[S]` share of comparisons an image wins, in [0, 1]; NaN leaves an image out. Constant.
        beta: Strength of the pull to the reference, > 0; the default is Diffusion-DPO's for SDXL,
            the part of the paper that was read states none.
        log_base: Of the discount, "e" or "2".

    Returns:
        Unreduced loss `[G]`; a group without a strict pair gives 0.
    """
    core.positive("beta", beta)
    errors.one_per_sample("err", err)
    return list_rank(
        -beta * errors.change(err, ref_err),
        phi,
        cu_groups,
        family="pair",
        weights="lambda",
        rank_source="label",
        log_base=log_base,
        backend=backend,
    )
