"""Processes that wait for one of them, for as long as its work takes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_numbers = itertools.count()


@contextmanager
def others_wait(accelerator: Any) -> Iterator[None]:
    """After its body, which may take the main process hours (a judge), all go on together.

    A collective would end after its timeout, or hang as long as that is. Here the others look for a
    word of the main process, which it also leaves when it fails.

    Raises:
        ValueError: in the others, where the main process failed.
    """
    if accelerator.num_processes == 1:
        yield
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    name = f"prefkern-{next(_numbers)}"  # the same in all processes, which come here in one order
    try:
        yield
    except BaseException:
        store.set(name, "failed")
        raise
    if accelerator.is_main_process:
        store.set(name, "done")
    while not store.check([name]):  # raises when the store is gone with its process
        time.sleep(0.2)
    if store.get(name) != b"done":
        raise ValueError("another process failed; its error says why.")
    accelerator.wait_for_everyone()
