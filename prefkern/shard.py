"""Which rows of a vocabulary the ranks of a group hold.

Shapes: V vocabulary, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .backends.plan import ShardPlan, read_shard, write_shard

TOKENS = ("same", "own", "sequence")


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's rows [start, ...) of a head's vocabulary of `total`, up to the next rank's start.

    Made on all ranks of the group together: they tell each other where they start.

    Args:
        tokens: What the ranks of the group score. "same": the same tokens, with the same hidden
            states (tensor parallelism). "own": each rank other tokens, gradients being means over
            ranks (data parallelism); hidden states are gathered, the head never. "sequence": each
            rank a part of the tokens, gradients being sums (sequence parallelism).
        group: The process group whose ranks hold the vocabulary, in the order of their rows.
        start, total: First row here and size of the whole vocabulary. Of a DTensor head sharded by
            rows, group, start and total are read from it: leave them out.

    Raises:
        ValueError: an unknown `tokens`, only some of the other three, ranks that disagree or whose
            rows are not in their order.
    """

    tokens: str
    group: Any = None
    start: int | None = None
    total: int | None = None
    # text of the plan; "" until it is known. Compiled code reads it as a constant.
    place: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise ValueError(
                f"Shard: tokens must be one of {TOKENS}, got {self.tokens!r}; say 'same' where all "
                "ranks score the same tokens (tensor parallelism), 'own' where each has its own."
            )
        given = {"group": self.group, "start": self.start, "total": self.total}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == 3:
            return
        if self.start is None or self.total is None or self.group is None:
            raise ValueError(f"Shard: group, start and total belong together, got no {missing}.")
        place = _everywhere(self.group, self.start, self.total, self.tokens)
        object.__setattr__(self, "place", place)

    def plan(self) -> ShardPlan:
        """Raises ValueError where group, start and total are not known."""
        if not self.place:
            raise ValueError(
                "Shard must name group, start and total where the weight is a plain tensor, got "
                f"only tokens={self.tokens!r}."
            )
        return read_shard(self.place)


def _everywhere(group: Any, start: int, total: int, tokens: str) -> str:
    """The plan's text; every rank is asked where it starts."""
    found: list[tuple[int, int, str]] = [(0, 0, "")] * group.size()
    torch.distributed.all_gather_object(found, (start, total, tokens), group=group)
    starts = tuple(first for first, *_ in found)
    ordered = starts[0] == 0 and list(starts) == sorted(starts) and starts[-1] <= total
    if not ordered or any((size, kind) != (total, tokens) for _, size, kind in found):
        raise ValueError(
            "the shards of a head must begin at 0, lie one after the other in the order of their "
            f"ranks and agree in total and tokens, got (start, total, tokens) = {found}."
        )
    rank = torch.distributed.get_group_rank(group, torch.distributed.get_rank())
    return write_shard(ShardPlan(group.group_name, rank, starts, total, tokens))


def is_distributed(tensor: object) -> bool:
    """True for a DTensor, without importing torch.distributed."""
    return type(tensor).__name__ == "DTensor"


def of_distributed(weight: Any, shard: Shard | None) -> Shard:
    """The place of a DTensor's rows; no rank is asked, its layout is known.

    Raises:
        ValueError: no `Shard(tokens=...)`, or another layout than rows on one mesh dimension.
    """
    from torch.distributed.tensor import Shard as Rows

    if shard is None:
        raise ValueError(
            "head: weight must be a plain tensor or say how it is sharded, got a DTensor; under "
            "data parallelism (FSDP) compute inside the head's own call: "
            "prefkern.integrations.head.at_head(model); under tensor parallelism pass "
            "Head(weight, shard=Shard(tokens='same'))."
        )
    if tuple(weight.placements) != (Rows(0),):
        raise ValueError(
            "head: a DTensor weight must be sharded by vocabulary rows on one mesh dimension, got "
            f"{weight.placements} on {weight.device_mesh}."
        )
    mesh, total = weight.device_mesh, weight.shape[0]
    world = mesh.size()
    rows = -(-total // world)  # as torch.chunk cuts them: the last ranks may have fewer, or none
    starts = tuple(min(i * rows, total) for i in range(world))
    found = Shard(shard.tokens)
    plan = ShardPlan(
        mesh.get_group().group_name, mesh.get_local_rank(), starts, total, shard.tokens
    )
    object.__setattr__(found, "place", write_shard(plan))
    return found
