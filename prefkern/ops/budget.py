"""How many rows of logits a forward keeps for its backward.

Sizes follow from shapes and the budget alone (by default backends/memory.py's), never from free
memory: the budget changes time, not one bit of a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import memory


def check_budget(memory_budget: int | None) -> None:
    whole = isinstance(memory_budget, int) and not isinstance(memory_budget, bool)
    if memory_budget is not None and (not whole or memory_budget < 0):
        raise ValueError(
            f"memory_budget must be a number of bytes >= 0 or None, got {memory_budget!r}; "
            "0 keeps nothing (the backward recomputes), None is a constant of the device."
        )


# On a GPU kept rows end at a multiple of this many logits, where fast products want them to; the
# cache is as much larger than its rows of V, and the budget counts it.
PADDED = 16
UNKNOWN = 1 << 40  # rows, where only the op learns how many there are


def rows_kept(
    rows: int, v: int, bytes_per_logit: int, memory_budget: int | None, device: torch.device
) -> int:
    """Rows [V] of the cache for as many logits of `rows` rows as fit the budget (on a GPU, where
    tiles lie in it, up to a whole row more); 0 where no backward can follow or a checkpoint region
    would drop what is kept."""
    if v == 0 or not torch.is_grad_enabled() or _in_checkpoint_region():
        return 0
    if memory_budget is None:
        memory_budget = memory.default_budget(device)
    if device.type == "cpu":
        return min(rows, memory_budget // (v * bytes_per_logit))
    padded = -(-v // PADDED) * PADDED
    return -(-min(rows * padded, memory_budget // bytes_per_logit) // v)


def cut_rows(kept: int, rows: int, v: int, device: torch.device) -> int:
    """`rows_kept` of UNKNOWN rows, once they are known."""
    if v == 0 or device.type == "cpu":
        return min(kept, rows)
    return min(kept, -(-rows * (-(-v // PADDED) * PADDED) // v))


def _in_checkpoint_region() -> bool:
    """True under saved-tensor hooks (non-reentrant checkpointing, offloading): what the forward
    keeps would be dropped or moved, so keeping it only costs memory."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def count_of_all(targets: Tensor, ranks: int) -> int:
    """Rows whose logits may be kept where every rank brings its own: UNKNOWN until the op gathers
    them; while tracing all have as many. 0 as in `count_scored`."""
    if not torch.compiler.is_compiling():
        return UNKNOWN
    return 0 if targets.device.type == "cuda" else targets.numel() * ranks


def count_scored(targets: Tensor, ignore_index: int, num_scored: int | None) -> int:
    """Rows whose logits may be kept: exact on CPU, the stated `num_scored` or N elsewhere. 0 where
    a CUDA graph may hold one direction without the other: only the other leaves ignored rows out,
    and the two would disagree about where a kept logit lies."""
    if num_scored is not None:
        return num_scored
    if targets.device.type == "cuda" and (
        torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()
    ):
        return 0
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        return int((targets != ignore_index).sum())
    return targets.numel()
