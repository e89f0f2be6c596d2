"""Runs functions of a test module on several gloo ranks of this machine.

Ranks meet through a file, so no port can be taken by somebody else; the first failure ends all of
them, and what each printed is part of the message. A rank that is done leaves by os._exit: after
FSDP2 over gloo the interpreter's own exit can destroy a running thread of torch, and the process
then ends by std::terminate with its work done.

Ranks are forks of one process (multiprocessing's fork server) that has imported what they need and
has done nothing else: importing takes each of them 4 s of a core.
"""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

IMPORTED = (
    "torch.distributed.fsdp", "torch.distributed.tensor", "accelerate", "prefkern.train.run",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(list(IMPORTED))


def _work(
    folder: str, module: str, calls: list[list[str]], rank: int, world: int, environment: dict
) -> None:
    """One rank, from its start to its end."""
    code = 1
    try:
        # a file, not a pipe: a full pipe would stop the rank that nobody reads
        output = os.open(f"{folder}/rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(environment)
        _call(folder, module, calls, rank, world)
        print("done")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(folder: str, module: str, calls: list[list[str]], rank: int, world: int) -> None:
    import torch
    import torch.distributed as dist

    sys.path.insert(0, os.path.dirname(module))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=300),
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location("worker", module)
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    sys.modules["worker"] = worker
    spec.loader.exec_module(worker)
    for name, *arguments in calls:
        getattr(worker, name)(*arguments)
        print("passed", name, *arguments, flush=True)
    if dist.is_initialized():  # a whole run ends it
        dist.destroy_process_group()


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
        given = (str(folder), module, calls, rank, world, environment)
        ranks.append(FORKS.Process(target=_work, args=given))
        ranks[-1].start()
    deadline = time.monotonic() + seconds
    try:
        while any(rank.exitcode is None for rank in ranks):
            assert all(rank.exitcode in (None, 0) for rank in ranks), told(folder, world)
            assert time.monotonic() < deadline, f"over {seconds} s\n{told(folder, world)}"
            time.sleep(0.02)
        assert all(rank.exitcode == 0 for rank in ranks), told(folder, world)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [(folder / f"rank{rank}.txt").read_text() for rank in range(world)]


def told(folder: Path, world: int) -> str:
    parts = [(folder / f"rank{rank}.txt").read_text()[-4000:] for rank in range(world)]
    return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(parts))
