"""What a process hands to collectives: name and bytes of each call, whoever makes it.

Functional collectives (the ops of prefkern, DTensor) and those of torch.distributed (FSDP2, DDP's
own reducer apart) are replaced for the length of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

# (owner, its function, the collective, which argument is this rank's part)
_CALLS = (
    ("functional", "all_gather_into_tensor", "all_gather", 0),
    ("functional", "all_reduce", "all_reduce", 0),
    ("functional", "reduce_scatter_tensor", "reduce_scatter", 0),
    ("distributed", "all_gather_into_tensor", "all_gather", 1),
    ("distributed", "all_gather_single", "all_gather", 1),
    ("distributed", "all_reduce", "all_reduce", 0),
    ("distributed", "reduce_scatter_tensor", "reduce_scatter", 1),
    ("distributed", "reduce_scatter_single", "reduce_scatter", 1),
)


class Traffic:
    """Calls in their order: (collective, bytes this rank handed over)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []


def wire_bytes(name: str, size: float, ranks: int) -> float:
    """Bytes a rank sends where `size` are handed over, by a ring."""
    parts = {"all_gather": ranks - 1, "reduce_scatter": (ranks - 1) / ranks,
             "all_reduce": 2 * (ranks - 1) / ranks}  # fmt: skip
    return size * parts[name]


@contextmanager
def traffic() -> Iterator[Traffic]:
    found = Traffic()
    owners: dict[str, Any] = {"functional": torch.ops._c10d_functional, "distributed": dist}

    def counted(plain: Any, name: str, at: int, label: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            names = ("output_tensor", "input_tensor") if "gather" in label else ("output", "input")
            part = args[at] if len(args) > at else kwargs[names[at]]
            assert isinstance(part, Tensor)
            found.calls.append((name, part.numel() * part.element_size()))
            return plain(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, label, name, at in _CALLS:
            plain = getattr(owners[owner], label, None)
            if plain is None:  # the names of other versions of torch
                continue
            put = counted(plain, name, at, label)
            stack.enter_context(mock.patch.object(owners[owner], label, put))
        yield found
