"""Direct preference optimization, with label smoothing and per-pair offsets and weights."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2305.18290 eq. 7",
    status="checked against the authors' code and TRL",
    reference=True,
)
def dpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    pair_weight: float | Tensor = 1.0,  # [P]
    offset: float | Tensor = 0.0,  # [P]
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> Tensor:  # [P]
    """DPO: logistic loss of the log-ratio margin.

    l = w [(1 - eps) softplus(-m) + eps softplus(m)],
    m = beta (logratio(chosen) - logratio(rejected)) - offset

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; label smoothing as in conservative DPO, eq. 3;
    the offset as in ODPO (arXiv 2402.10571).

    Args:
        pair_weight: Constant factor of each pair, number or `[P]`.
        offset: Margin each pair must exceed, number or `[P]`, after beta.
        beta: Strength of the pull to the reference, > 0, number or `[P]`.
        reference_free: Takes the reference log-probability as 0.

    >>> import torch
    >>> one = torch.tensor([-4.0], dtype=torch.float64)
    >>> answer = SeqStats(logp=one, ref_logp=one)
    >>> round(dpo(answer, answer).item(), 6)
    0.693147
    """
    core.positive("beta", beta)
    core.not_negative("pair_weight", pair_weight)
    gap = core.difference(
        core.sequence_logratio(chosen, reference_free),
        core.sequence_logratio(rejected, reference_free),
    )
    margin = core.per_item("beta", beta, gap) * gap - core.per_item("offset", offset, gap)
    return core.per_item("pair_weight", pair_weight, gap) * links.smoothed_logistic(
        margin, label_smoothing
    )
