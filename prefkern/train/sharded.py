"""Models of which every process holds a part: DTensors of FSDP2 and of tensor parallelism, and what
ZeRO-3 makes of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations import hf
from ..shard import is_distributed
from . import zero


def place(accelerator: Any, model: hf.Model) -> hf.Model:
    """A frozen model where the run computes, sharded as the policy is."""
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    if zero.stage_of(accelerator) == 3:
        return zero.place_parts(accelerator, model)
    return model if is_sharded(model) else model.to(accelerator.device)


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds parts of some of its weights only."""
    # of the state, for parameters may be gathered at the moment
    tensors = module.state_dict(keep_vars=True).values()
    return any(is_distributed(value) or zero.in_parts(value) for value in tensors)


def size(parameter: Tensor) -> int:
    """Numbers in the whole of a parameter."""
    return zero.shape(parameter).numel()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    if zero.in_parts(tensor):
        return tensor.ds_tensor  # type: ignore[attr-defined]
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, without gradient; every process must ask."""
    if zero.in_parts(tensor):
        return zero.whole_of_parts(tensor)
    with torch.no_grad():
        found = tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    return found.detach()


def reshard(module: nn.Module) -> None:
    """Gives up weights that FSDP2 kept gathered after a forward without backward, so that the
    parameters of a module are the parts that this process holds, as its optimizer knows them."""
    # FSDP2 does so before it hands out a state; a module within one of its units has no other way
    module.state_dict()


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copies `value`, all of it and the same in every process, into a tensor that may be sharded;
    no process is asked."""
    if zero.in_parts(target) or hasattr(target, "_hp_mapping"):  # of an optimizer of DeepSpeed's
        zero.fill_parts(target, value)
        return
    if is_distributed(target):
        from torch.distributed.tensor import distribute_tensor

        like: Any = target
        value = distribute_tensor(
            value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    target.copy_(value)


def fill_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors into a module that may be sharded.

    Raises:
        KeyError: a tensor of the module is not in `state`.
    """
    for name, tensor in module.state_dict(keep_vars=True).items():
        fill(tensor, state[name])


def gathered(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The whole tensors of a module's state on the CPU, one after the other; every process must
    call it, those without `keep` hold no more than one tensor and return nothing."""
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights stay one tensor, as `save_pretrained` wants them
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            value = whole(tensor)
            seen[id(tensor)] = value.cpu() if keep else value.new_empty(0)
        if keep:
            found[name] = seen[id(tensor)]
    return found


@contextmanager
def as_whole(model: hf.Model) -> Iterator[None]:
    """In here transformers' `save_pretrained` of whole tensors is this process's alone, and the
    model's settings do not say that it was shared out."""
    settings = vars(hf.causal_lm(model).config)
    shared = settings.pop("distributed_config", None)
    try:
        yield
    finally:
        if shared is not None:
            settings["distributed_config"] = shared


Compute = Callable[..., Any]


def called(compute: Compute, *arguments: Any) -> Any:
    """The way into a model that is its own root."""
    return compute(*arguments)
