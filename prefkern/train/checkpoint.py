"""Checkpoints in the Hugging Face layout, written so that a kill at any moment loses none.

A checkpoint is built under a name of the run's own, sealed with the size and checksum of every
file, synced to disk and renamed to `checkpoint-N`: a folder of that name is complete, and damage to
it is seen. Tensors are safetensors, all else is JSON; nothing is pickled.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import sharded, sharded_files, zero
from .noise import own_rates
from .output import Output, writing
from .processes import Processes
from .providers import Provider
from .seals import STATE_FILE, file_sums, last_whole, read_json, seal, write_json


def _sync(folder: Path) -> None:
    """Forces contents and names of a folder to disk before it is renamed."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _parameters(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Those of the trained modules by their names in a checkpoint."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def _names(modules: dict[str, nn.Module]) -> dict[int, str]:
    """id of a parameter -> stable name, over the trained modules."""
    return {id(parameter): name for name, parameter in _parameters(modules).items()}


def optimizer_state(
    optimizer: torch.optim.Optimizer, modules: dict[str, nn.Module]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors "exp_avg|policy.layer.weight" -> value, and the JSON part of the groups."""
    if zero.owns(optimizer):
        return zero.optimizer_rows(optimizer, _parameters(modules))
    names = _names(modules)
    tensors = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}|{names[id(parameter)]}"] = torch.as_tensor(value).contiguous()
    groups = [
        {k: v for k, v in group.items() if k != "params"}
        | {"params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return tensors, groups


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    modules: dict[str, nn.Module],
    tensors: dict[str, Tensor],
    groups: list[dict[str, Any]],
) -> None:
    names = _names(modules)
    if zero.owns(optimizer):
        now = [g[zero.NAMES] for g in zero.inner(optimizer).param_groups]
    else:
        now = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    if now != [g["params"] for g in groups]:
        raise ValueError(
            "the checkpoint's optimizer holds other parameters than this model trains."
        )
    if zero.owns(optimizer):
        zero.load_optimizer_rows(optimizer, _parameters(modules), tensors, groups)
        return
    order = [name for group in groups for name in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("|")
        state.setdefault(order.index(name), {})[kind] = value
    numbers = iter(range(len(order)))
    plain = [
        {k: tuple(v) if k == "betas" else v for k, v in g.items()}
        | {"params": [next(numbers) for _ in g["params"]]}
        for g in groups
    ]
    optimizer.load_state_dict({"state": state, "param_groups": plain})


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of every generator a step may draw from, as plain lists (one process)."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, numbers, gauss = random.getstate()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().tolist(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).tolist()
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)


def save_checkpoint(
    output: Output | None,  # of the main process
    processes: Processes,
    *,
    modules: dict[str, Any],  # "policy", and what is trained beside it
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    rng: list[dict[str, Any]],  # one entry per process
    state: dict[str, Any],  # the loop's own, JSON
    trainer_state: dict[str, Any],  # transformers' trainer_state.json
    keep: int | None,
    parts: Sequence[Provider] = (),  # which have files of their own
) -> None:
    """Writes `checkpoint-N` whole or not at all, and drops this run's oldest beyond `keep`.

    Every process calls it. Of whole models the main process writes all; sharded ones are written
    by those that hold them, and renamed once all have told that their parts are on disk.

    Raises:
        OSError: in every process: one of them cannot write; earlier checkpoints stay.
    """
    name = f"checkpoint-{state['step']}"
    in_parts = zero.owns(optimizer)
    in_parts = in_parts or any(sharded.is_sharded(module) for module in modules.values())
    frozen = {k: v for part in parts for k, v in part.moved().items()}
    weights = sharded_files.tensors_of(modules, frozen) if in_parts else {}
    tensors, groups = optimizer_state(optimizer, modules)

    building = processes.from_main(lambda: _begin(_held(output), name))
    sums: dict[str, list[int]] = {}
    if in_parts:
        tensors, numbers = sharded_files.split(tensors)
        state = state | {"optimizer": {"tensors": sorted(tensors), "numbers": numbers}}
        sums = _write_parts(processes, building, weights | tensors)

    def files() -> None:
        if not in_parts:
            save_weights(building, modules, tokenizer)
            save_file(tensors, building / "optimizer.safetensors")
        write_json(building / "optimizer.json", groups)
        write_json(building / "scheduler.json", scheduler.state_dict())
        write_json(building / "rng_state.json", rng)
        write_json(building / "trainer_state.json", trainer_state)
        write_json(building / STATE_FILE, state)
        for part in parts:
            part.save(building)

    processes.from_main(lambda: _finish(_held(output), building, name, keep, sums, files))


def _held(output: Output | None) -> Output:
    """The output folder, which the main process holds."""
    assert output is not None
    return output


def _begin(output: Output, name: str) -> Path:
    """In the main process: the folder in which a checkpoint is built."""
    with writing(output.folder / name, lambda: last_whole(output.folder)):
        return output.partial(name)


def _finish(
    output: Output,
    building: Path,
    name: str,
    keep: int | None,
    sums: dict[str, list[int]],
    files: Callable[[], None],
) -> None:
    """In the main process: its own files, the mark, and the name. `sums`: of the others' files."""
    final = output.folder / name
    with writing(final, lambda: last_whole(output.folder)):
        try:
            files()
            seal(building, output.run, sums)
            _sync(building)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)  # a full disk gets its space back
            raise
        _put_in_place(output, building, final, keep)


def _write_parts(
    processes: Processes, building: Path, tensors: dict[str, Tensor]
) -> dict[str, list[int]]:
    """Every process's part of the tensors; sums of all their files."""
    rank = processes.accelerator.process_index
    sums, failed = {}, ""
    try:
        sharded_files.write_parts(building, tensors)
        if (building / sharded_files.FOLDER).is_dir():
            _sync(building / sharded_files.FOLDER)
        sums = file_sums(building, sharded_files.own_files(building, rank))
    except Exception as error:
        failed = sharded_files.reason(error)
    told = processes.everyone((sums, failed))
    failures = [f"process {i}: {text}" for i, (_, text) in enumerate(told) if text]
    if failures:

        def discard() -> str:
            shutil.rmtree(building, ignore_errors=True)
            return last_whole(building.parent)

        raise OSError(
            f"{building} could not be written: {failures[0]}; {processes.from_main(discard)}."
        )
    return {name: size for part, _ in told for name, size in part.items()}


def _put_in_place(output: Output, building: Path, final: Path, keep: int | None) -> None:
    if final.exists():  # the same step again, after a resume from an older checkpoint
        if final not in output.checkpoints():
            raise FileExistsError(17, "a folder that is not this run's has that name")
        output.aside(final)
    os.rename(building, final)
    _sync_folder_only(output.folder)
    if keep is not None:
        for old in output.checkpoints()[:-keep]:
            output.aside(old)


def _sync_folder_only(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_weights(
    folder: Path,
    modules: dict[str, Any],
    tokenizer: Any,
    states: dict[str, dict[str, Tensor]] | None = None,
) -> None:
    """Model and tokenizer in the layout that `from_pretrained` reads, and what was trained beside
    the model in a file of its own name each. `states`: the whole tensors of sharded modules."""
    states = states or {}
    given = {"state_dict": states["policy"]} if "policy" in states else {}
    with own_rates(modules["policy"]), sharded.as_whole(modules["policy"]):
        modules["policy"].save_pretrained(folder, **given)
    tokenizer.save_pretrained(folder)
    for name, module in modules.items():
        if name != "policy":
            found = states.get(name) or module.state_dict()
            save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{name}.safetensors")


def save_final(
    output: Output | None,  # of the main process
    processes: Processes,
    modules: dict[str, nn.Module],
    tokenizer: Any,
    parts: Sequence[Provider] = (),
) -> None:
    """The trained model in the output folder itself, whole or not at all; every process calls it,
    and the main one gathers what is sharded.

    Raises:
        OSError: in every process: it cannot be written; checkpoints stay.
    """
    keep = processes.accelerator.is_main_process
    states = {
        name: sharded.gathered(module, keep)
        for name, module in modules.items()
        if sharded.is_sharded(module)
    }

    def write() -> None:
        assert output is not None
        with writing(output.folder, lambda: last_whole(output.folder)):
            building = output.partial("final")
            try:
                save_weights(building, modules, tokenizer, states)
                for part in parts:
                    part.save_final(building)
                _sync(building)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
            output.install(building)

    processes.from_main(write)


def load_training_state(
    checkpoint: Path,
    processes: Processes,
    *,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    parts: Sequence[Provider] = (),
) -> bool:
    """Everything but the loop's own state and whole weights of the policy, which were loaded with
    the model.

    Returns:
        False where another number of processes wrote it, so that generators start anew.

    Raises:
        ValueError: naming the checkpoint: it does not fit this run, or cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    reading = (KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
    try:
        _load_tensors(checkpoint, modules, optimizer, parts)
        scheduler.load_state_dict(read_json(checkpoint / "scheduler.json"))
        rng = read_json(checkpoint / "rng_state.json")
        if len(rng) != processes.accelerator.num_processes:
            return False
        set_rng_state(rng[processes.accelerator.process_index], processes.accelerator.device)
        return True
    except torch.OutOfMemoryError:
        raise
    except (*reading, CheckpointException) as error:
        why = sharded_files.reason(error)
        raise ValueError(f"{checkpoint} cannot be read ({why}).") from error


def _load_tensors(
    checkpoint: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Provider],
) -> None:
    for module in modules.values():
        sharded.reshard(module)
    like = zero.empty_rows if zero.owns(optimizer) else torch.Tensor.detach
    parameters = {
        name: like(parameter)
        for name, parameter in _parameters(modules).items()
        if parameter.requires_grad
    }
    groups = read_json(checkpoint / "optimizer.json")
    if sharded_files.are_in(checkpoint):
        frozen = {k: v for part in parts for k, v in part.moved().items()}
        found = read_json(checkpoint / STATE_FILE)["optimizer"]
        state = sharded_files.empty_state(found["tensors"], parameters)
        weights = sharded_files.tensors_of(modules, frozen)
        sharded_files.read_parts(checkpoint, weights | state)
        sharded_files.put_back(modules, weights)
        state |= {name: torch.tensor(value) for name, value in found["numbers"].items()}
    else:
        for name, module in modules.items():
            if name != "policy":
                sharded.fill_module(module, load_file(checkpoint / f"{name}.safetensors"))
        state = load_file(checkpoint / "optimizer.safetensors")
        state = sharded_files.spread_state(state, parameters)
    load_optimizer_state(optimizer, modules, state, groups)
