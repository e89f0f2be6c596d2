"""DenseDPO: preferences per segment of two videos, in one sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import core, links
from ..declare import diffusion
from . import errors


@diffusion(
    source="arXiv 2506.03517",
    status="paper read; the reduction inside a segment is not stated there",
    reference=True,
)
def dense_dpo(
    chosen_err: Tensor,  # [P, F]
    rejected_err: Tensor,  # [P, F]
    ref_chosen_err: Tensor,  # [P, F]
    ref_rejected_err: Tensor,  # [P, F]
    *,
    labels: Tensor,  # [P, F]
    beta: float = 500.0,
) -> Tensor:  # [P]
    """DenseDPO: Diffusion-DPO whose error change is summed over segments with their labels' signs.

    l = softplus(beta sum_f l_f (delta^0_f - delta^1_f)),  delta = e - e_ref of segment f

    arXiv 2506.03517. One segment labelled +1 is Flow-DPO. Errors come from
    error_sum(..., segments=...); whether the paper sums or averages inside a segment is not stated,
    so reduction="sum", "mean" and "mean_all" all have their reading. Segments that all tie give log
    2 and no gradient: drop such pairs.

    Args:
        chosen_err, rejected_err: `[P, F]` errors of the policy for the first and second video.
        ref_chosen_err, ref_rejected_err: `[P, F]` the reference's, same noise and time. Constant.
        labels: `[P, F]` +1 where the first video's segment is better, -1 the second's, 0 a tie.
    """
    core.positive("beta", beta)
    delta = errors.gap(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err)
    if delta.dim() != 2:
        raise ValueError(
            f"the errors must be [P, F], one per segment, got {list(delta.shape)}; reduce with "
            "error_sum(..., segments=..., num_segments=F), or use diff_dpo."
        )
    signs = core.data("labels", labels, delta)
    # select, not multiply: a tied segment contributes nothing, whatever its error is
    voted = torch.where(signs == 0, 0.0, signs * delta).sum(1)
    return links.logistic(-beta * voted)
