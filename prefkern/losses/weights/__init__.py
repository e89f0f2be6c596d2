"""Token weights: what multiplies the statistics of each token before they are summed."""

from .contrast import step_cosine, tisdpo, tree_tpo
from .token_weights import SparseMask, SparseMasks, ld_dpo, mapo, sequence_of, sparsepo, tgdpo

__all__ = [
    "SparseMask",
    "SparseMasks",
    "ld_dpo",
    "mapo",
    "sequence_of",
    "sparsepo",
    "step_cosine",
    "tgdpo",
    "tisdpo",
    "tree_tpo",
]
