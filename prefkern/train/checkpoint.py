"""Checkpoints in the Hugging Face layout, written so that a kill at any moment loses none.

A checkpoint is built under a name of the run's own, sealed with the size and checksum of every
file, synced to disk and renamed to `checkpoint-N`: a folder of that name is complete, and damage to
it is seen. Tensors are safetensors, all else is JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import short_hash
from .noise import own_rates
from .output import MARK, Output, list_checkpoints, read_mark, writing
from .providers import Provider

STATE_FILE = "prefkern_state.json"


def find_resume(choice: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume_from_checkpoint` means, and what to say of it; None: start from
    the beginning.

    Raises:
        ValueError: it is damaged (the newest whole one is named), or is no checkpoint.
    """
    if choice is None:
        return None, []
    if choice.lower() not in ("auto", "true"):
        path = Path(choice)
        if not (path / STATE_FILE).is_file():
            raise ValueError(
                f"{path} is not a checkpoint of this trainer (no {STATE_FILE}); pass a "
                "checkpoint-N folder, or auto for the newest in output_dir."
            )
        if (why := damage(path)) is not None:
            raise ValueError(f"{path} is damaged: {why}; {last_whole(path.parent)}.")
        return path, []
    notes: list[str] = []
    for path in reversed(list_checkpoints(output_dir)):
        if (why := damage(path)) is None:
            return path, notes
        notes.append(f"{path} is damaged ({why}) and is passed over")
    if notes:
        raise ValueError(f"no checkpoint in {output_dir} is whole: {'; '.join(notes)}.")
    return None, []


def last_whole(output_dir: Path) -> str:
    """What can be continued from, in words."""
    for path in reversed(list_checkpoints(output_dir)):
        if damage(path) is None:
            return f"the last whole checkpoint is {path}"
    return "there is no whole checkpoint"


def seal(folder: Path, run: str) -> None:
    """Writes the mark of a finished checkpoint: its run, and size and checksum of every file."""
    files = file_sums(folder, _files(folder))
    content = {"run": run, "files": files}
    write_json(folder / MARK, content | {"check": short_hash(content)})


def damage(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is not as it was written, and how; None: all are."""
    mark = read_mark(checkpoint)
    if mark is None:
        return f"{MARK} is missing or cannot be read"
    files = mark.get("files")
    if not isinstance(files, dict) or mark.get("check") != short_hash(
        {"run": mark["run"], "files": files}
    ):
        return f"{MARK} was changed"
    for name in files:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        size = (checkpoint / name).stat().st_size
        if size != files[name][0]:
            return f"{name} has {size} bytes and was written with {files[name][0]}"
    for name, found in file_sums(checkpoint, files).items():
        if found != files[name]:
            return f"the bytes of {name} changed since it was written"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def file_sums(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Of files below `folder`, several at a time: zlib leaves the interpreter to others."""
    names = list(names)
    with ThreadPoolExecutor(4) as pool:
        sums = pool.map(lambda name: file_sum(folder / name), names)
        return dict(zip(names, sums, strict=True))


def file_sum(path: Path) -> list[int]:
    """Size and CRC-32."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _sync(folder: Path) -> None:
    """Forces contents and names of a folder to disk before it is renamed."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _names(modules: dict[str, nn.Module]) -> dict[int, str]:
    """id of a parameter -> stable name, over the trained modules."""
    return {
        id(parameter): f"{prefix}.{name}"
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def optimizer_state(
    optimizer: torch.optim.Optimizer, modules: dict[str, nn.Module]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors "exp_avg|policy.layer.weight" -> value, and the JSON part of the groups."""
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
    now = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    if now != [g["params"] for g in groups]:
        raise ValueError(
            "the checkpoint's optimizer holds other parameters than this model trains."
        )
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
    output: Output,
    *,
    modules: dict[str, Any],  # "policy", and what is trained beside it
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    rng: list[dict[str, Any]],  # one entry per process
    state: dict[str, Any],  # the loop's own, JSON
    trainer_state: dict[str, Any],  # transformers' trainer_state.json
    keep: int | None,
    parts: Iterable[Provider] = (),  # which have files of their own
) -> Path:
    """Writes `checkpoint-N` whole or not at all, and drops this run's oldest beyond `keep`.

    Raises:
        OSError: it cannot be written; earlier ones stay.
    """
    final = output.folder / f"checkpoint-{state['step']}"
    with writing(final, lambda: last_whole(output.folder)):
        building = output.partial(final.name)
        try:
            save_weights(building, modules, tokenizer)
            tensors, groups = optimizer_state(optimizer, modules)
            save_file(tensors, building / "optimizer.safetensors")
            write_json(building / "optimizer.json", groups)
            write_json(building / "scheduler.json", scheduler.state_dict())
            write_json(building / "rng_state.json", rng)
            write_json(building / "trainer_state.json", trainer_state)
            write_json(building / STATE_FILE, state)
            for part in parts:
                part.save(building)
            seal(building, output.run)
            _sync(building)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)  # a full disk gets its space back
            raise
        if final.exists():  # the same step again, after a resume from an older checkpoint
            if final not in output.checkpoints():
                raise FileExistsError(17, "a folder that is not this run's has that name")
            output.aside(final)
        os.rename(building, final)
        _sync_folder_only(output.folder)
    if keep is not None:
        for old in output.checkpoints()[:-keep]:
            output.aside(old)
    return final


def _sync_folder_only(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_weights(folder: Path, modules: dict[str, Any], tokenizer: Any) -> None:
    """Model and tokenizer in the layout that `from_pretrained` reads, and what was trained beside
    the model in a file of its own name each."""
    with own_rates(modules["policy"]):
        modules["policy"].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, module in modules.items():
        if name != "policy":
            state = {k: v.contiguous() for k, v in module.state_dict().items()}
            save_file(state, folder / f"{name}.safetensors")


def save_final(
    output: Output,
    modules: dict[str, nn.Module],
    tokenizer: Any,
    parts: Iterable[Provider] = (),
) -> None:
    """The trained model in the output folder itself, whole or not at all.

    Raises:
        OSError: it cannot be written; checkpoints stay.
    """
    with writing(output.folder, lambda: last_whole(output.folder)):
        building = output.partial("final")
        try:
            save_weights(building, modules, tokenizer)
            for part in parts:
                part.save_final(building)
            _sync(building)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        output.install(building)


def load_training_state(
    checkpoint: Path,
    *,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    rank: int,
    world: int,
    device: torch.device,
) -> None:
    """Everything but the policy's weights (loaded with the model) and the loop's own state.

    Raises:
        ValueError: naming the checkpoint: it does not fit this run, or cannot be read.
    """
    try:
        _load_training_state(checkpoint, modules, optimizer, scheduler, rank, world, device)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{checkpoint} cannot be read ({reason}).") from error


def _load_training_state(
    checkpoint: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    rank: int,
    world: int,
    device: torch.device,
) -> None:
    for name, module in modules.items():
        if name != "policy":
            module.load_state_dict(load_file(checkpoint / f"{name}.safetensors"))
    load_optimizer_state(
        optimizer,
        modules,
        load_file(checkpoint / "optimizer.safetensors"),
        read_json(checkpoint / "optimizer.json"),
    )
    scheduler.load_state_dict(read_json(checkpoint / "scheduler.json"))
    rng = read_json(checkpoint / "rng_state.json")
    if world != len(rng):
        raise ValueError(
            f"{checkpoint} was written by {len(rng)} processes, this run has {world}; "
            "continue with the same number."
        )
    set_rng_state(rng[rank], device)
