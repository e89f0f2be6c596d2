"""Token weights: one number per token, constant or learned, that weighs a token's statistics.

A weight stage runs before the statistics are summed over each sequence. It is a pure function of
[N] tensors and returns TokenWeights: the weights and, where it has one, a penalty [S]. A loss names
its stage (`weights=`); preference_loss gives it what prefkern.losses.inputs.STAGE_INPUTS lists.
"""

from .length import d2po, ld_dpo
from .masks import SparseMask, SparseMasks, mapo, sparsepo
from .model_ratios import sepo, tgdpo, tisdpo
from .prefix import iw_opd
from .steps import step_cosine, tree_tpo

__all__ = [
    "SparseMask",
    "SparseMasks",
    "d2po",
    "iw_opd",
    "ld_dpo",
    "mapo",
    "sepo",
    "sparsepo",
    "step_cosine",
    "tgdpo",
    "tisdpo",
    "tree_tpo",
]
