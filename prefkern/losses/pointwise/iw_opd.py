"""IW-OPD: on-policy distillation whose later tokens count less once the student has strayed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..declare import pointwise
from ..weights import prefix


def _reads(*, divergence: str = "sampled", **_: Any) -> tuple[str, ...]:
    core.choice("divergence", divergence, prefix.DIVERGENCES)
    return ("logp",) if divergence == "sampled" else (divergence,)


@pointwise(
    source="arXiv 2606.22600",
    status="formula as TRL's experimental trainer has it, second-hand; the exact divergences under "
    "the same weights are ours",
    reference=True,
    reads=_reads,
    items="scored_tokens",
    weights=prefix.iw_opd,
)
def iw_opd(seq: SeqStats, *, divergence: str = "sampled") -> Tensor:  # [S]
    """IW-OPD: distillation on the student's own answers, weighted by the drift of the prefix.

    l = sum_t w_t a_t (log r - log p) (sampled),  sum_t w_t KL(p || r) (rkl),
    sum_t w_t KL(r || p) (fkl),  a_t = log r - log p of the sampled token, constant

    with w_t = 1 + gamma (1 - sum_{j<t} |a_j| / sum_j |a_j|), which the weight stage
    prefkern.losses.weights.iw_opd forms. The teacher is given as the reference model, the answers
    are sampled from the policy; the objective divides by the number of tokens. The
    gradient of "sampled" is the one-sample estimate of that of rkl, which is exact here.

    Xie et al. 2026 (arXiv 2606.22600).

    Args:
        seq: Weighted statistics of the answers, each field `[S]`; needs the one that the
            divergence reads.
        divergence: "sampled", "rkl" or "fkl".

    Returns:
        Sums over tokens `[S]`.
    """
    if divergence == "sampled":
        return -seq.logratio
    return seq.require(_reads(divergence=divergence)[0])
