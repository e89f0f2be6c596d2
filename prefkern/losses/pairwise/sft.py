"""Plain likelihood of the chosen answer, as one term among others (TRL's loss_type "sft")."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..record import Loss, Supervised


def sft(chosen: SeqStats, rejected: SeqStats) -> Tensor:  # [P]
    """SFT: no preference loss of its own; the objective's likelihood term is all there is.

    l = 0,  objective: sft_weight * NLL(chosen) per token of the batch

    Maximum likelihood, as TRL's DPO trainer adds it in loss_type=["sigmoid", "sft"] (arXiv
    2405.16436 in TRL's index).

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`.

    Returns:
        Zeros `[P]`; the likelihood term has the weight `sft_weight`, default 1.

    Raises:
        ValueError: shapes that differ.
    """
    return torch.zeros_like(core.difference(chosen.require("logp"), rejected.require("logp")))


SFT = Loss(
    sft,
    "sft",
    "pairwise",
    status="checked against TRL",
    source="TRL loss_type sft",
    rewards=core.logp_rewards,
    supervised=Supervised("sft_weight", 1.0),
)
