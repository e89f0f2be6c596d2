"""What the ops and the backends exchange.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

# Rows of per-token numbers the two-model forward hands to its backward (lse, ref_lse, ...); their
# meaning is private to a backend.
SAVED_ROWS = 10


@dataclass(frozen=True)
class Problem:
    """One op call, as far as the choice of a backend depends on it."""

    op: str
    device: str  # device type, e.g. "cpu"
    dtype: torch.dtype  # compute dtype
    weight_dtype: torch.dtype | None = None
    stats: tuple[str, ...] = ()
    N: int | None = None
    V: int | None = None
    D: int | None = None

    def __str__(self) -> str:
        shape = ", ".join(
            f"{k}={v}" for k in ("N", "V", "D") if (v := getattr(self, k)) is not None
        )
        text = f"{self.op} on {self.device}, {str(self.dtype).removeprefix('torch.')}"
        if self.weight_dtype not in (None, self.dtype):
            text += f" (head {str(self.weight_dtype).removeprefix('torch.')})"
        if shape:
            text += f", {shape}"
        if self.stats:
            text += f", stats={','.join(self.stats)}"
        return text


class Backend(Protocol):
    """What a backend module offers (documentation only; nobody inherits from it).

    Beside `unsupported`, a module has `<op>_fwd` and `<op>_bwd` for every op it serves, with the
    signatures of the functions in `prefkern.backends.eager`. It may have `held_back(problem)`:
    reasons why automatic choice passes over it although it can serve the problem.
    """

    def unsupported(self, problem: Problem) -> list[str]:
        """Reasons why this backend cannot serve `problem`; empty when it can."""
        ...
