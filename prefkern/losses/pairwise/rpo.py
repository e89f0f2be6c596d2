"""Regularised preference optimization: DPO plus likelihood as an adversarial regulariser."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from ..declare import formula, pairwise
from ..record import Supervised
from .dpo import dpo


@pairwise(
    source="arXiv 2405.16436",
    status="checked against the authors' code",
    reference=True,
    supervised=Supervised("eta", 0.005, mode="sum", scale="beta"),
)
def rpo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.01) -> Tensor:  # [P]
    """RPO: DPO; the objective adds the summed NLL of the chosen answer times eta beta.

    l = softplus(-beta (logratio(chosen) - logratio(rejected))),
    objective: mean l + eta beta * mean over pairs of NLL(chosen)

    Liu et al. 2024 (arXiv 2405.16436), as in the authors' handbook fork. Two other conventions:
    `rpo_seq` (their OpenRLHF fork, NLL per token of each answer) and TRL's ["sigmoid", "sft"] (NLL
    per token of the batch). The weights are not interchangeable.
    """
    return formula(dpo)(chosen, rejected, beta=beta)


@pairwise(
    source="arXiv 2405.16436",
    status="checked against the authors' code",
    reference=True,
    supervised=Supervised("eta", 0.2, mode="seq"),
)
def rpo_seq(chosen: SeqStats, rejected: SeqStats, *, beta: float = 0.5) -> Tensor:  # [P]
    """RPO with the NLL of the chosen answer per token.

    l = softplus(-beta (logratio(chosen) - logratio(rejected))),
    objective: mean l + eta * mean over pairs of NLL(chosen) / length

    Liu et al. 2024 (arXiv 2405.16436), as in the authors' OpenRLHF fork.
    """
    return formula(dpo)(chosen, rejected, beta=beta)
