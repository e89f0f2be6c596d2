"""The table of memory that a call may take by default: logits kept for a backward, and tiles.

A row follows from the kind of device and the memory it was built with, never from what is free: the
same call keeps the same logits and makes the same products every time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .. import traced

MIB, GIB = 1 << 20, 1 << 30


class Row(NamedTuple):
    """Bytes on one kind of device."""

    kind: str  # torch.device.type; "": any other
    least: int  # memory of the device from which on the row holds
    budget: int  # logits kept between forward and backward
    tiles: int  # tiles that live at once: every model's, and dx where it takes no policy's place


# First match counts. Devices sold as 80 GB hold 79 GiB, as 141 GB 139 GiB. Of 8,192 bfloat16 tokens
# of a 152k vocabulary (2.3 GiB) 4 GiB hold all, of fp32 logits of one model (4.6 GiB) 86 %, and
# 8 GiB those of two models as far; tiles of 1 GiB are 3 products instead of 10. 512 MiB on a CPU
# hold the fp32 logits of two models for 2,048 tokens of a 32,000-entry vocabulary. Native kernels
# have tiles of their own: on a CPU `tiles` is what interpreted ones take.
TABLE = (
    Row("cuda", 130 * GIB, budget=8 * GIB, tiles=GIB),
    Row("cuda", 75 * GIB, budget=4 * GIB, tiles=GIB),
    Row("cuda", 0, budget=GIB, tiles=256 * MIB),
    Row("cpu", 0, budget=512 * MIB, tiles=256 * MIB),
    Row("", 0, budget=256 * MIB, tiles=256 * MIB),
)


def row(kind: str, memory: int = 0) -> Row:
    """The row of a device of that type with `memory` bytes."""
    return next(r for r in TABLE if r.kind in (kind, "") and r.least <= memory)


@functools.cache
def _row_at(kind: str, index: int | None) -> Row:
    """Asked once per device and process: a forward and its backward read the same row."""
    if kind != "cuda" or index is None:
        return row(kind)
    try:
        memory = torch.cuda.get_device_properties(index).total_memory
    except (AssertionError, RuntimeError):
        # Fake tensors may name a GPU that is not here, or that a forked process cannot reach
        memory = 0
    return row(kind, memory)


# The device is known while a graph is traced, and what it answers is then a constant of the graph.
@traced.constant_result
def default_budget(device: torch.device) -> int:
    """Bytes of logits kept for a backward where the caller names none."""
    return _row_at(device.type, device.index).budget


def tile_bytes(device: torch.device) -> int:
    """Bytes of all tiles of a head op that live at once."""
    return _row_at(device.type, device.index).tiles
