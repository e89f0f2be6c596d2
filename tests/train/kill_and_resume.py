"""A training process that kills itself with SIGKILL at a chosen point (run by test_resume.py)."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from prefkern.train import checkpoint, loop, train
from prefkern.train.read_config import from_mapping
from prefkern.train.run import Run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(module, name: str, number: int, *, after: bool = False) -> None:
    """The `number`-th call (from 1) of module.name ends the process, before or after its work."""
    original, calls = getattr(module, name), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number and not after:
            die()
        result = original(*args, **kwargs)
        if calls[0] == number and after:
            die()
        return result

    setattr(module, name, wrapper)


def kill_during_rename(number: int) -> None:
    """Ends the process right after the `number`-th folder was renamed, before anything else."""
    kill_at_call(checkpoint.os, "rename", number, after=True)


POINTS = {
    "none": lambda: None,
    "mid-accumulation": lambda: kill_at_call(Run, "micro_batch", 6),
    "mid-save": lambda: kill_at_call(checkpoint, "save_file", 3),
    "before-rename": lambda: kill_at_call(checkpoint, "_sync", 2, after=True),
    "after-rename": lambda: kill_during_rename(1),
    "mid-prune": lambda: kill_during_rename(2),
    "after-step": lambda: kill_at_call(loop, "clip", 2, after=True),
    "mid-log": lambda: kill_at_call(loop, "performance", 2),
    "final-save": lambda: kill_at_call(checkpoint.os, "replace", 2, after=True),
}

if __name__ == "__main__":
    point, settings = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    POINTS[point]()
    train(from_mapping(settings))
