"""Regularised preference optimization: DPO plus likelihood as an adversarial regulariser."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..record import Loss, Supervised
from .dpo import dpo


def rpo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.01) -> Tensor:  # [P]
    """RPO: DPO; the objective adds the summed NLL of the chosen answer times eta beta.

    l = softplus(-beta (logratio(chosen) - logratio(rejected))),
    objective: mean l + eta beta * mean over pairs of NLL(chosen)

    Liu et al. 2024 (arXiv 2405.16436), as in the authors' handbook fork. Two other conventions:
    `rpo_seq` (their OpenRLHF fork, NLL per token of each answer) and TRL's ["sigmoid", "sft"] (NLL
    per token of the batch). The weights are not interchangeable.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        beta: Strength of the pull to the reference, > 0, default 0.01.

    Returns:
        Unreduced loss `[P]`, without the likelihood term (weight `eta`, default 0.005, times beta).

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    return dpo(chosen, rejected, beta=beta)


def rpo_seq(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.5) -> Tensor:  # [P]
    """RPO with the NLL of the chosen answer per token.

    l = softplus(-beta (logratio(chosen) - logratio(rejected))),
    objective: mean l + eta * mean over pairs of NLL(chosen) / length

    Liu et al. 2024 (arXiv 2405.16436), as in the authors' OpenRLHF fork.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        beta: Strength of the pull to the reference, > 0, default 0.5.

    Returns:
        Unreduced loss `[P]`, without the likelihood term (weight `eta`, default 0.2).

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    return dpo(chosen, rejected, beta=beta)


RPO, RPO_SEQ = (
    Loss(
        fn,
        fn.__name__,
        "pairwise",
        needs_reference=True,
        status="checked against the authors' code",
        source="arXiv 2405.16436",
        rewards=core.logratio_rewards,
        supervised=term,
    )
    for fn, term in (
        (rpo, Supervised("eta", 0.005, mode="sum", scale="beta")),
        (rpo_seq, Supervised("eta", 0.2, mode="seq")),
    )
)
