"""SparsePO: learned masks on the token log-ratios and token KLs of TDPO1's margin."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..weights import masks
from ..weights.masks import KL_FIELD


def _reads(*, kl_direction: str = "ref_pol", **_: Any) -> tuple[str, ...]:
    core.choice("kl_direction", kl_direction, tuple(KL_FIELD))
    return ("logp", KL_FIELD[kl_direction])


def _rewards(seq: SeqStats, *, beta: float, kl_direction: str = "ref_pol", **_: Any) -> Tensor:
    return beta * (seq.logratio + seq.require(KL_FIELD[kl_direction]))


@pairwise(
    source="arXiv 2410.05102",
    status="loss, logit and mask gradients checked against the authors' code; paper text not read",
    reference=True,
    reads=_reads,
    rewards=_rewards,
    weights=masks.sparsepo,
)
def sparsepo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    kl_direction: str = "ref_pol",
    kl_sign: int = 1,
) -> Tensor:  # [P]
    """SparsePO: logistic loss of the masked log-ratio margin plus the masked KL margin.

    l = softplus(-h),
    h = beta [logratio(chosen) - logratio(rejected) + kl_sign (kl(chosen) - kl(rejected))]

    with log-ratios summed under the reward mask and KLs under the KL mask. The weight stage
    prefkern.losses.weights.sparsepo applies the masks and adds their L1 norms; with unit masks this
    is TDPO1.

    Christopoulou et al. 2024 (arXiv 2410.05102), as in the authors' code: KL(reference || policy)
    with TDPO1's sign. kl_direction="pol_ref", kl_sign=-1 is the other reading of the paper's text.

    Args:
        chosen, rejected: Masked statistics of the two answers, each field `[P]`; needs `logp`,
            `ref_logp` and `fkl` (kl_direction="ref_pol") or `rkl` ("pol_ref").
        kl_direction: "ref_pol" is KL(reference || policy), "pol_ref" the reverse.
        kl_sign: +1 or -1, sign of the KL margin.

    Returns:
        Unreduced loss `[P]`, without the masks' penalty.
    """
    core.positive("beta", beta)
    core.choice("kl_direction", kl_direction, tuple(KL_FIELD))
    if kl_sign not in (1, -1):
        raise ValueError(f"kl_sign must be +1 or -1, got {kl_sign}.")
    field = KL_FIELD[kl_direction]
    gap = core.difference(chosen.logratio, rejected.logratio)
    kl_gap = chosen.require(field) - rejected.require(field)
    return links.logistic(beta * (gap + kl_sign * kl_gap))
