"""While the main process judges, the others wait without a collective, and end when it fails."""

from __future__ import annotations

import multiprocessing
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from prefkern.train.waiting import others_wait


def process(rank: int, port: int, fails: bool, out) -> None:
    import torch.distributed as dist

    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=6)
    )
    accelerator = SimpleNamespace(
        num_processes=2, is_main_process=rank == 0, wait_for_everyone=dist.barrier
    )
    try:
        with others_wait(accelerator):
            if rank == 0:
                time.sleep(8)  # longer than a collective of this group may take
                if fails:
                    raise OSError("the judge is gone")
        out.put((rank, "on"))
    except (OSError, ValueError) as error:
        out.put((rank, str(error)))


@pytest.mark.parametrize("fails", [False, True])
def test_two_processes(fails):
    context = multiprocessing.get_context("fork")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = context.Queue()
    ranks = [context.Process(target=process, args=(r, store.port, fails, out)) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    found = dict(out.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join(20)
        assert rank.exitcode == 0
    if fails:
        assert found == {0: "the judge is gone", 1: "another process failed; its error says why."}
    else:
        assert found == {0: "on", 1: "on"}


def test_one_process_waits_for_nobody():
    ran = []
    with others_wait(SimpleNamespace(num_processes=1)):
        ran.append(1)
    assert ran
