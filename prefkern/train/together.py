"""An error in one process ends all of them, with its message.

The others may stand in a collective that never comes to its end. So a process that fails says so in
the store by which the processes found each other, and in each a thread looks there.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

KEY = "prefkern-error"
EVERY = 0.5  # seconds between two looks
GRACE = 5.0  # in which a process that is no longer waiting ends by an exception of its own
_KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError}


class Watch:
    """The thread of one process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        # a connection of its own: the main thread may wait on the other one
        self.store = torch.distributed.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look, name=KEY, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.ended.wait(EVERY):
            try:
                if not self.store.check([KEY]):
                    continue
                found = json.loads(self.store.get(KEY))
                text = f"process {found['rank']} failed: {found['text']}"
                if found["rank"] == self.rank:
                    return
            except RuntimeError:  # torch's error where the connection is gone
                text = "the process that keeps the processes' store is gone"
            if not self.ended.wait(GRACE):
                print(text, file=sys.stderr, flush=True)
                os._exit(1)
            return

    def tell(self, error: BaseException) -> dict[str, Any]:
        """Notes an error of this process; returns the first one of all."""
        kind = next((name for name, known in _KINDS.items() if isinstance(error, known)), "")
        text = " ".join(str(error).split()) or type(error).__name__
        mine = {"rank": self.rank, "kind": kind, "text": text}
        try:
            return json.loads(self.store.compare_set(KEY, "", json.dumps(mine)))
        except (RuntimeError, ValueError):  # the store is gone with its process
            return mine

    def end(self) -> None:
        self.ended.set()
        self.thread.join(GRACE)  # it may itself wait for a store whose machine is gone


_watch: list[Watch] = []  # of this process, while a run goes on


def watch(accelerator: Any) -> None:
    """From here to the end of `ended_together`, where there are other processes."""
    if accelerator.num_processes > 1 and not _watch:
        _watch.append(Watch(accelerator.process_index))


@contextmanager
def ended_together() -> Iterator[None]:
    """A run: where it fails in another process first, that process's error is raised here.

    Raises:
        ValueError, OSError, RuntimeError: as in the process that failed, which is named.
    """
    try:
        yield
    except BaseException as error:
        first = _watch[0].tell(error) if _watch else None
        if first is not None and _is_other(first, error):
            kind = _KINDS.get(first["kind"], RuntimeError)
            raise kind(f"process {first['rank']} failed: {first['text']}") from error
        raise
    finally:
        while _watch:
            _watch.pop().end()


def _is_other(first: dict[str, Any], error: BaseException) -> bool:
    """Whether the first error is not this one, which all processes may have found alike."""
    return first["rank"] != _watch[0].rank and first["text"] != " ".join(str(error).split())
