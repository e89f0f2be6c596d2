"""Checkpoints in the Hugging Face layout, written so that a kill at any moment loses none.

A checkpoint is built in `tmp-checkpoint-N`, synced to disk and renamed to `checkpoint-N`: a folder
of that name is always complete. Tensors are safetensors, all else is JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .providers import Provider

_NAME = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "prefkern_state.json"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(int(m[1]), p) for p in output_dir.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def find_resume(choice: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means; None: start from the beginning."""
    if choice is None:
        return None
    if choice.lower() in ("auto", "true"):
        found = list_checkpoints(output_dir)
        return found[-1] if found else None
    path = Path(choice)
    if not (path / STATE_FILE).is_file():
        raise ValueError(
            f"{path} is not a checkpoint of this trainer (no {STATE_FILE}); pass a checkpoint-N "
            "folder, or auto for the newest in output_dir."
        )
    return path


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
    output_dir: Path,
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
    """Writes `checkpoint-N` atomically and drops the oldest ones beyond `keep`."""
    final = output_dir / f"checkpoint-{state['step']}"
    building = output_dir / f"tmp-{final.name}"
    clear_partial(output_dir)
    building.mkdir(parents=True)
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
    _sync(building)
    if final.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(final)
    os.rename(building, final)
    _sync_folder_only(output_dir)
    if keep is not None:
        for old in list_checkpoints(output_dir)[:-keep]:
            stale = output_dir / f"tmp-{old.name}"  # renamed first: never a half-deleted name
            os.rename(old, stale)
            shutil.rmtree(stale)
    return final


def _sync_folder_only(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_checkpoints(output_dir: Path) -> None:
    """Drops every checkpoint of an earlier run; the newest first."""
    for path in reversed(list_checkpoints(output_dir)):
        stale = output_dir / f"tmp-{path.name}"
        os.rename(path, stale)
        shutil.rmtree(stale)


def clear_partial(output_dir: Path) -> None:
    """Removes what a killed run left half written or half deleted."""
    for path in output_dir.glob("tmp-*"):
        if path.is_dir():
            shutil.rmtree(path)


def save_weights(folder: Path, modules: dict[str, Any], tokenizer: Any) -> None:
    """Model and tokenizer in the layout that `from_pretrained` reads, and what was trained beside
    the model in a file of its own name each."""
    modules["policy"].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, module in modules.items():
        if name != "policy":
            state = {k: v.contiguous() for k, v in module.state_dict().items()}
            save_file(state, folder / f"{name}.safetensors")


def save_final(output_dir: Path, modules: dict[str, nn.Module], tokenizer: Any) -> None:
    """The trained model in output_dir itself, each file replaced in one step."""
    building = output_dir / "tmp-final"
    clear_partial(output_dir)
    building.mkdir(parents=True)
    save_weights(building, modules, tokenizer)
    _sync(building)
    for path in sorted(building.iterdir()):
        if path.is_dir() and (output_dir / path.name).exists():  # a second adapter's folder
            shutil.rmtree(output_dir / path.name)
        os.replace(path, output_dir / path.name)
    building.rmdir()


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
    """Everything but the policy's weights (loaded with the model) and the loop's own state."""
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
