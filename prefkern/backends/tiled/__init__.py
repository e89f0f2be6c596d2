"""The head ops on a GPU: library products of row blocks and vocabulary tiles, plus an epilogue.

The driver owns everything that is the same for every kind of kernel: which rows count, the tile
plan, the products, what is kept for the backward. A backend brings the kernels of
`epilogue.Epilogue`, which read tiles, and binds them to `fold`, `fold_again` and `unfold`.
"""

from .backward import unfold
from .forward import fold, fold_again

__all__ = ["fold", "fold_again", "unfold"]
