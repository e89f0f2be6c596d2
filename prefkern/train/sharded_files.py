"""Checkpoints of sharded models: every process writes the parts that it holds.

`torch.distributed.checkpoint` in its safetensors layout (nothing is pickled): trained weights,
buffers and the optimizer's tensors, each under "kind|name". Any number of processes can read them,
one that holds whole models included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..shard import is_distributed
from . import sharded, zero

FOLDER = "sharded"  # in a checkpoint
WEIGHT = "weight"  # kind of what a module holds; the others are the optimizer's


def are_in(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by a sharded run."""
    return (checkpoint / FOLDER).is_dir()


def own_files(checkpoint: Path, rank: int) -> list[str]:
    """Those that process `rank` wrote, below the checkpoint."""
    files = (checkpoint / FOLDER).glob(f"shard-{rank + 1:05d}-*")
    return sorted(str(path.relative_to(checkpoint)) for path in files)


def tensors_of(modules: dict[str, nn.Module], frozen: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What a checkpoint holds of modules that are trained, and of `frozen` ones that were moved:
    of the first the trained weights and the buffers, of the second all."""
    found: dict[str, Tensor] = {}
    for prefix, module in {**modules, **frozen}.items():
        state = module.state_dict()  # before the parameters: see sharded.reshard
        for name, parameter in module.named_parameters():
            if parameter.requires_grad or prefix in frozen:
                parts = zero.in_parts(parameter)
                value = zero.rows(zero.whole_of_parts(parameter)) if parts else parameter.detach()
                found[f"{WEIGHT}|{prefix}.{name}"] = value
        for name, buffer in module.named_buffers():
            if name in state:
                found[f"{WEIGHT}|{prefix}.{name}"] = buffer
    return found


def write_parts(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the parts of all processes, which must all call it.

    Raises:
        CheckpointException: in every process, where one of them cannot write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(checkpoint / FOLDER), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer)


@torch.no_grad()
def read_parts(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Reads into tensors that are as sharded as those that were written, or otherwise.

    Raises:
        CheckpointException: in every process: a tensor is not there, or of another shape.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if tensors:
        reader = HuggingFaceStorageReader(str(checkpoint / FOLDER))
        dcp.load(dict(tensors), storage_reader=reader)


def put_back(modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """What was read of `tensors_of(modules)` into parameters that are no DTensors themselves."""
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if zero.in_parts(parameter) and parameter.requires_grad:
                zero.fill_parts(parameter, sharded.whole(tensors[f"{WEIGHT}|{prefix}.{name}"]))


def reason(error: BaseException) -> str:
    """An error in one line; of one that processes collected, the first process's own."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (first, _) = next(iter(failures.items()))
        return f"process {rank}: {reason(first)}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The optimizer's tensors, and its numbers, which JSON holds."""
    numbers = {name: float(value) for name, value in state.items() if value.dim() == 0}
    return {name: value for name, value in state.items() if name not in numbers}, numbers


def empty_state(names: list[str], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the optimizer's tensors "kind|name", shaped and sharded as the parameters."""
    return {name: torch.zeros_like(parameters[name.partition("|")[2]]) for name in names}


def spread_state(state: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of an optimizer as parts of them, where their parameters are sharded."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        parameter = parameters[name.partition("|")[2]]
        found[name] = value
        if value.dim() and is_distributed(parameter):
            found[name] = torch.zeros_like(parameter)
            sharded.fill(found[name], value)
    return found
