"""TLPO style: one flow preference loss per dimension of quality."""

from __future__ import annotations

from torch import Tensor

from .. import core, links
from ..declare import diffusion
from . import errors


@diffusion(
    source="arXiv 2508.11255",
    status="provisional: diff_dpo per expert, summed with equal weights, is a guess after the "
    "abstract; the fusion of the experts is absent",
    reference=True,
)
def tlpo(
    chosen_err: Tensor,  # [P, K]
    rejected_err: Tensor,  # [P, K]
    ref_chosen_err: Tensor,  # [P, K]
    ref_rejected_err: Tensor,  # [P, K]
    *,
    beta: float = 500.0,
) -> Tensor:  # [P]
    """Sum over preference dimensions of Diffusion-DPO, each with its own pair and its own expert.

    l = sum_k softplus(beta Delta_k),  Delta as in diff_dpo for the expert of dimension k

    After the abstract of arXiv 2508.11255 (motion, lip synchronisation, visual quality), whose
    equations were not available: only the first stage, which trains one adapter per dimension, is
    here. The fusion of the experts over timesteps and layers is not.

    Args:
        chosen_err, rejected_err: `[P, K]` errors of expert k for the two videos of its pair.
        ref_chosen_err, ref_rejected_err: `[P, K]` the reference's. Constant.
        beta: Strength of the pull to the reference, > 0; the default is DenseDPO's.
    """
    core.positive("beta", beta)
    delta = errors.gap(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err)
    if delta.dim() != 2:
        raise ValueError(
            f"the errors must be [P, K], one column per dimension, got {list(delta.shape)}; for "
            "one dimension use diff_dpo."
        )
    return links.logistic(-beta * delta).sum(1)
