"""Plain likelihood of the chosen answer, as one term among others (TRL's loss_type "sft")."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..declare import pairwise
from ..record import Supervised


@pairwise(
    source="TRL loss_type sft",
    status="checked against TRL",
    supervised=Supervised("sft_weight", 1.0, alone=True),
)
def sft(chosen: SeqStats, rejected: SeqStats) -> Tensor:  # [P]
    """SFT: no preference loss of its own; the objective's likelihood term is all there is.

    l = 0,  objective: sft_weight * NLL(chosen) per token of the batch

    Maximum likelihood, as TRL's DPO trainer adds it in loss_type=["sigmoid", "sft"] (arXiv
    2405.16436 in TRL's index).

    Returns:
        Zeros `[P]`; the likelihood term has the weight `sft_weight`, default 1.
    """
    return torch.zeros_like(core.difference(chosen.require("logp"), rejected.require("logp")))
