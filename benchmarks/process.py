"""Commands in processes of their own: what they print, how they end, and that they end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .results import ROOT


class Ended(NamedTuple):
    status: int | str  # exit status, the name of a signal, "out of time", "absent"
    seconds: float
    text: str  # everything it printed

    @property
    def why(self) -> str:
        last = self.text.strip().splitlines()[-1:] or ["no output"]
        return f"the process ended with {self.status}: {last[0]}"


def run(
    command: Sequence[str], seconds: float | None = None, env: Mapping[str, str] | None = None,
    cwd: object = ROOT,
) -> Ended:  # fmt: skip
    """Runs a command and everything it starts; past `seconds` the whole group is killed, so that
    no compiler or test worker goes on beside what comes next."""
    start = time.monotonic()
    try:
        child = subprocess.Popen(
            list(command), cwd=str(cwd), env={**os.environ, **(env or {})}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
    except FileNotFoundError:
        return Ended("absent", 0.0, f"{command[0]} is not on this machine")
    status: int | str
    try:
        text, _ = child.communicate(timeout=seconds)
        status = child.returncode
        if status < 0:
            status = signal.Signals(-status).name
    except subprocess.TimeoutExpired:
        end_group(child.pid)
        text, _ = child.communicate()
        status = "out of time"
    except BaseException:  # the user's Ctrl-C reaches this process alone
        end_group(child.pid)
        raise
    return Ended(status, round(time.monotonic() - start, 1), text)


def end_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
        os.killpg(leader, signal.SIGKILL)


def worker_environment(threads: int, keep_memory: bool = False) -> dict[str, str]:
    """Environment of a measuring process.

    keep_memory: freed memory stays with the process (glibc), as under a caching allocator, for
    every variant alike. Without it each step maps its large buffers anew: 0.1 s for 250 MiB, and
    0.3 to 0.6 s on a virtual machine that hands freed pages back to its host.
    """
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)} if keep_memory else {}
    return {
        **keep,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # peers import transformers and datasets; nothing may reach for a network
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
