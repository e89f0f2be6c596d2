"""Runs functions of a test module on several gloo ranks of this machine.

Ranks meet through a file, so no port can be taken by somebody else; the first failure ends all of
them, and what each printed is part of the message. A rank that is done leaves by os._exit: after
FSDP2 over gloo the interpreter's own exit can destroy a running thread of torch, and the process
then ends by std::terminate with its work done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
WORKER = """
import importlib.util, json, os, sys, datetime, torch, torch.distributed as dist
folder, tests, module, calls, rank, world = sys.argv[1:7]
sys.path[:0] = [tests, os.path.dirname(module)]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", store=dist.FileStore(folder + "/store", int(world)), rank=int(rank),
    world_size=int(world), timeout=datetime.timedelta(seconds=300),
)
spec = importlib.util.spec_from_file_location("worker", module)
worker = importlib.util.module_from_spec(spec)
sys.modules["worker"] = worker
spec.loader.exec_module(worker)
for name, *arguments in json.loads(calls):
    getattr(worker, name)(*arguments)
    print("passed", name, *arguments, flush=True)
if dist.is_initialized():  # a whole run ends it
    dist.destroy_process_group()
print("done")
sys.stdout.flush()
os._exit(0)
"""


def run_ranks(
    folder: Path, module: str, function: str, world: int, *arguments: str, seconds: float = 600
) -> list[str]:
    """What each rank printed. `module` is the path of a file, `function` one of its functions.

    Raises:
        AssertionError: a rank failed, or they took longer than `seconds`.
    """
    return _run(folder, module, world, [[function, *arguments]], seconds)


def run_checks(
    folder: Path, module: str, world: int, calls: list[tuple[str, ...]], seconds: float = 600
) -> dict[tuple[str, ...], str]:
    """Several functions of a module with their arguments, one after the other by the same ranks:
    starting a rank costs more than most of what it checks. (function, arguments ...) -> "" where
    all ranks passed it, else what they printed; the first failure ends all of them."""
    try:
        _run(folder, module, world, [list(call) for call in calls], seconds)
    except AssertionError as error:
        text = str(error)
        printed = [(folder / f"rank{rank}.txt").read_text() for rank in range(world)]
        done = [{line for line in lines.splitlines() if line.startswith("passed")}
                for lines in printed]  # fmt: skip
        passed = set.intersection(*done)
        return {call: "" if " ".join(("passed", *call)) in passed else text for call in calls}
    return dict.fromkeys(calls, "")


def answers(module: str, checks: Sequence[tuple[Any, ...]], seconds: float = 600) -> Any:
    """A fixture for `checks`, each (world, function, arguments ...): found(world) is what
    `run_checks` says of all checks of that many ranks, which are started once."""

    @pytest.fixture(scope="module")
    def found(tmp_path_factory):
        seen: dict[int, dict] = {}

        def ask(world: int) -> dict:
            if world not in seen:
                calls = [tuple(call) for size, *call in checks if size == world]
                folder = tmp_path_factory.mktemp(f"ranks{world}")
                seen[world] = run_checks(folder, module, world, calls, seconds)
            return seen[world]

        return ask

    return found


def _run(
    folder: Path, module: str, world: int, calls: list[list[str]], seconds: float
) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "TRITON_INTERPRET": "1",
    }
    ranks = []
    for rank in range(world):
        command = [sys.executable, "-c", WORKER, str(folder), str(HERE), module, json.dumps(calls)]
        command += [str(rank), str(world)]
        # a file, not a pipe: a full pipe would stop the rank that nobody reads
        with (folder / f"rank{rank}.txt").open("w") as output:
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in ranks):
            assert all(process.poll() in (None, 0) for process in ranks), told(folder, world)
            assert time.monotonic() < deadline, f"over {seconds} s\n{told(folder, world)}"
            time.sleep(0.02)
        assert all(process.returncode == 0 for process in ranks), told(folder, world)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [(folder / f"rank{rank}.txt").read_text() for rank in range(world)]


def told(folder: Path, world: int) -> str:
    parts = [(folder / f"rank{rank}.txt").read_text()[-4000:] for rank in range(world)]
    return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(parts))
