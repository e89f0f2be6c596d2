"""Runs of two gloo ranks of which one fails at a named place (started by test_failing_ranks.py).

Usage: failing_ranks.py FOLDER PLACE... The ranks of a place are forked from this process, which has
imported everything; what they printed, how they ended and after how many seconds goes to
FOLDER/PLACE.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from sharded_ranks import at_call, configured, launched  # noqa: E402

from prefkern.train import checkpoint, train  # noqa: E402
from prefkern.train import run as run_module  # noqa: E402
from prefkern.train.run import Run  # noqa: E402

TEXT = "out of paper"
LONG = 90.0  # seconds until a rank counts as hung, on a machine that much else runs on


def fail() -> None:
    print(f"failed at {time.time()}", flush=True)
    raise RuntimeError(TEXT)


def in_backward() -> None:
    """Between two collectives of the second micro-batch's backward: at the output of the first
    block, when the gradients of the last one are on their way."""
    plain, seen = Run.micro_batch, [0]

    def micro_batch(self, *args, **kwargs):
        seen[0] += 1
        if seen[0] == 2:
            block = self.step.policy.model.layers[0]
            block.register_forward_hook(lambda m, i, out: hooked(out))
        return plain(self, *args, **kwargs)

    def hooked(out):
        if torch.is_tensor(out) and out.requires_grad:
            out.register_hook(lambda grad: fail())

    Run.micro_batch = micro_batch


def small_buckets() -> None:
    """A bucket of DistributedDataParallel for every few parameters."""
    plain = torch.nn.parallel.DistributedDataParallel.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs | {"bucket_cap_mb": 0.001})

    torch.nn.parallel.DistributedDataParallel.__init__ = init


PLACES = {
    "loading": lambda: at_call(run_module, "open_data", 1, fail),
    "evaluation": lambda: at_call(Run, "micro_batch", 2, fail),
    "saving": lambda: at_call(checkpoint, "rng_state", 1, fail),
    "judge": lambda: None,  # its judge itself raises
    "ddp-backward": in_backward,
    "fsdp-backward": in_backward,
}


def rank_of(folder: str, place: str, rank: int) -> None:
    output = os.open(f"{folder}/{place}-{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/{place}-store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2,
                            timeout=timedelta(seconds=300))  # fmt: skip
    launched("fsdp" if place.startswith("fsdp") else "ddp")
    small_buckets()
    if rank == 1:
        PLACES[place]()
    name = {"evaluation": "evaluated", "judge": "judged"}.get(place, "plain")
    try:
        train(configured(folder, name))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(3)  # as a rank leaves whose threads may still wait
    os._exit(0)


def main(folder: str, *places: str) -> None:
    fork = multiprocessing.get_context("fork")
    for place in places:
        ranks = [fork.Process(target=rank_of, args=(folder, place, rank)) for rank in (0, 1)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + LONG
        ended = []
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            ended.append(process.exitcode)
        now = time.time()
        for process in ranks:
            process.kill()
            process.join()
        texts = [Path(f"{folder}/{place}-{rank}.txt").read_text() for rank in (0, 1)]
        told = "".join(texts).partition("failed at ")[2].split()
        found = {"ended": ended, "texts": texts, "seconds": now - float(told[0]) if told else None}
        Path(folder, f"{place}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
