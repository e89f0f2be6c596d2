"""Ranks of sharded training runs; each function is one of them (started by test_sharded.py)."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch.distributed as dist

from prefkern.train import checkpoint, sharded_files, train
from prefkern.train.evaluate import evaluate
from prefkern.train.loop import train_run
from prefkern.train.precompute import precompute
from prefkern.train.read_config import from_mapping
from prefkern.train.run import Run, prepare

# What `accelerate launch` sets of the settings in its file.
KINDS = {
    "ddp": {},
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    },
    "hybrid": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    },
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "DS_ACCELERATOR": "cpu",
            # vectors stay gathered, matrices are in parts
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": json.dumps(
                {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100}}
            ),
        }
        for stage in (2, 3)
    },
    "tensor": {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_TP_SIZE": "2",
    },
}


def launched(kind: str) -> None:
    """The environment of a process that accelerate started."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ.update(KINDS[kind])
    if kind.startswith("zero"):
        import deepspeed

        # its collectives through shared memory are C++ that it would compile here
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def runs(kind: str, folder: str, *names: str) -> None:
    """The runs of `folder`/NAME.json, one after the other."""
    launched(kind)
    for name in names:
        train_run(prepare(configured(folder, name)), final_run=False)


def trains(kind: str, folder: str, name: str) -> None:
    """`folder`/NAME.json from its start to its end, of rounds too."""
    launched(kind)
    train(configured(folder, name))


def evaluates(kind: str, folder: str, name: str) -> None:
    """Held-out metrics of a model that is not trained, in `folder`/NAME-metrics.json."""
    launched(kind)
    run = prepare(configured(folder, name), training=False)
    found = evaluate(run, run.examples)
    if run.is_main:
        Path(folder, f"{name}-metrics.json").write_text(json.dumps(found))


def precomputes(kind: str, folder: str, *names: str) -> None:
    """Caches of the reference, as `folder`/NAME.json says."""
    launched(kind)
    for name in names:
        precompute(configured(folder, name))


def configured(folder: str, name: str):
    return from_mapping(json.loads(Path(folder, f"{name}.json").read_text()))


def at_call(module, name: str, number: int, act) -> None:
    """`act()` before the `number`-th call (from 1) of module.name."""
    original, calls = getattr(module, name), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            act()
        return original(*args, **kwargs)

    setattr(module, name, wrapper)


def killed(folder: str, name: str, point: str) -> None:
    """A run in which one rank kills itself: in the middle of a step, of its part of a checkpoint,
    or where the checkpoint would get its name."""
    launched("fsdp")
    if dist.get_rank() == (0 if point == "rename" else 1):
        where = {
            "step": (Run, "micro_batch", 7),
            "save": (sharded_files, "own_files", 1),
            "rename": (checkpoint, "_put_in_place", 1),
        }
        at_call(*where[point], lambda: os.kill(os.getpid(), signal.SIGKILL))
    train_run(prepare(configured(folder, name)), final_run=False)


def fails(folder: str, name: str, then: str) -> None:
    """A run in which rank 1 raises in its second micro-batch."""
    launched("ddp")

    def fail() -> None:
        raise ValueError("out of paper")

    if dist.get_rank() == 1:
        at_call(Run, "micro_batch", 4, fail)
    if then == "ends":
        try:
            train(configured(folder, name))
        except ValueError as error:
            print(f"ValueError: {error}")
        return
    if dist.get_rank() == 0:
        train(configured(folder, name))
    try:
        train(configured(folder, name))
    except ValueError:
        time.sleep(900)
