"""Diffusion-LPO: the likelihood of a ranking of images, by what each gains on the reference."""

from __future__ import annotations

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..declare import diffusion
from . import errors


@diffusion(
    source="arXiv 2510.01540",
    status="abstract and summaries read, equation not; composed of Plackett-Luce and Diffusion-DPO",
    reference=True,
)
def lpo(
    err: Tensor,  # [S]
    ref_err: Tensor,  # [S]
    *,
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    beta: float = 2500.0,
    topk: int | Tensor | None = None,  # [G]
    ties: str = "strict",
    backend: str = "auto",
) -> Tensor:  # [G]
    """Diffusion-LPO: each image of a ranked group is preferred over all that stand below it.

    l = sum over ranks i <= topk of log sum_{j not before i} exp(s_j) - s_i,
    s = -beta delta,  delta = e - e_ref

    arXiv 2510.01540. A group of two is `diff_dpo` with kappa = beta, whose default for mean errors
    this is; the images of a group share noise and timestep.

    Args:
        err: `[S]` error of the policy's prediction for each image.
        ref_err: `[S]` the reference's, same noise and timesteps. Constant.
        beta: Strength of the pull to the reference, > 0.

    Returns:
        Unreduced loss `[G]`; a group of one gives 0.
    """
    core.positive("beta", beta)
    errors.one_per_sample("err", err)
    return list_rank(
        -beta * errors.change(err, ref_err),
        relevance,
        cu_groups,
        family="plackett_luce",
        topk=topk,
        ties=ties,
        backend=backend,
    )
