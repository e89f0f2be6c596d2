"""DeepSpeed's ZeRO-2 and ZeRO-3 under accelerate: its settings, and the parts that a process holds.

Stage 2 shares gradients and optimizer out, stage 3 the weights too. The optimizer of such a run
holds flat pieces of many parameters; checkpoints name every parameter's own tensors, through
DeepSpeed's functions for them, so that they are those of any other run.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..shard import is_distributed
from .config import TrainConfig

NAMES = "names"  # key of an optimizer's group: its parameters as a checkpoint names them
STAGES = (2, 3)
_OWN = ("optimizer", "scheduler")  # sections of DeepSpeed's file for what the options say


def stage_of(accelerator: Any) -> int:
    """0 where DeepSpeed does not run."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.zero_stage)


def check_options(config: TrainConfig) -> None:
    """Refuses, before accelerate starts DeepSpeed, options that a run under it cannot have."""
    for there, what in (
        (config.has_rounds, "num_rounds, round_data: rounds were not tried under it"),
        (config.head == "reward", "head=reward: a reward model is trained whole"),
        (config.sync_ref_model, "sync_ref_model: its reference moves by whole weights"),
        (config.slow_learning_rate is not None, "slow_learning_rate: two speeds have one process"),
        (config.dtype != "float32", f"dtype={config.dtype}: its optimizer holds fp32 weights; "
         "--dtype float32 --bf16 computes in bfloat16"),
    ):  # fmt: skip
        if there:
            raise ValueError(
                f"this run cannot be under DeepSpeed ({what}); set distributed_type: FSDP with "
                "fsdp_version: 2, or MULTI_GPU, in accelerate's file."
            )


def settle_plugin(plugin: Any, config: TrainConfig) -> None:
    """Gives DeepSpeed what the run decides, and refuses settings that say otherwise.

    Raises:
        ValueError: naming the setting.
    """
    settings = plugin.deepspeed_config
    stage = int(plugin.zero_stage)
    if stage not in STAGES:
        raise ValueError(
            f"zero_stage must be one of {STAGES}, got {stage}; set distributed_type: MULTI_GPU "
            "where weights, gradients and optimizer are to be whole in every process."
        )
    sharing = settings["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        device = (sharing.get(name) or {}).get("device", "none")
        if device != "none":
            raise ValueError(f"{name}_device: {device} is not supported; set it to none.")
    for name in _OWN:
        if name in settings:
            raise ValueError(
                f"DeepSpeed's file has a section {name!r}; leave it out: the run's options "
                "(--learning-rate, --lr-scheduler-type, ...) say it."
            )
    for name in ("fp16", "bf16"):
        if (settings.get(name) or {}).get("enabled") is True:
            raise ValueError(
                f"DeepSpeed's file enables {name}; leave it out: this trainer computes in fp32 or, "
                "with --bf16, in bfloat16 over fp32 weights."
            )
    # kept from the first run of a process: further ones find what it set
    limit = plugin.__dict__.setdefault("asked_clipping", settings.get("gradient_clipping", "auto"))
    if limit not in ("auto", None) and float(limit) != config.max_grad_norm:
        raise ValueError(
            f"gradient_clipping: {limit} is not the run's max_grad_norm={config.max_grad_norm}; "
            "leave it out of accelerate's file."
        )
    settings["gradient_clipping"] = config.max_grad_norm
    # the loop counts micro-batches and rows; DeepSpeed's own numbers have no say
    for name in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        settings[name] = 1
    settings["train_batch_size"] = "auto"
    # models are loaded whole, and shared out when they are prepared
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    plugin.zero3_init_flag, plugin.dschf = False, None
    unset_hf_deepspeed_config()


def before(
    accelerator: Any,
    root: nn.Module,
    optimizer: torch.optim.Optimizer,
    modules: dict[str, nn.Module],
) -> None:
    """What a model and its optimizer need before accelerate prepares them: under stage 3 parts of
    the weights; in the optimizer's groups the names of what they hold, since DeepSpeed puts flat
    parameters there."""
    if stage_of(accelerator) == 3:
        share_out(accelerator, root)
    names = {id(p): f"{k}.{name}" for k, m in modules.items() for name, p in m.named_parameters()}
    for group in optimizer.param_groups:
        group[NAMES] = [names[id(parameter)] for parameter in group["params"]]


def start_on_cpu(accelerator: Any) -> None:
    """accelerate leaves its settings of DeepSpeed out of account on CPUs; it runs over gloo."""
    from accelerate.state import PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    state = accelerator.state
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("no")
    plugin.select(_from_accelerator_state=True)
    state.deepspeed_plugins = plugin
    state.distributed_type = DistributedType.DEEPSPEED
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED


def share_out(accelerator: Any, model: nn.Module) -> None:
    """Takes a whole model on the host apart, weight by weight, and puts parts and buffers on the
    device; DeepSpeed alone would put whole weights there first."""
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=_sharing(accelerator))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(accelerator.device)


def _sharing(accelerator: Any) -> dict[str, Any]:
    """DeepSpeed's settings of what is shared out; "auto" is accelerate's, when it prepares."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {k: v for k, v in settings.items() if v != "auto"},
    }


def place_parts(accelerator: Any, model: nn.Module) -> nn.Module:
    """A frozen model, its weights shared out as stage 3 does the policy's."""
    import deepspeed

    share_out(accelerator, model)
    engine = deepspeed.initialize(model=model, config=_sharing(accelerator))[0]
    # the hooks that gather its weights go with the engine
    model.__dict__["_deepspeed_engine"] = engine
    return model


# ---- one parameter -------------------------------------------------------------------------------


def in_parts(tensor: Any) -> bool:
    """Whether a parameter is one of stage 3."""
    return hasattr(tensor, "ds_tensor")


def whole_of_parts(parameter: Any) -> Tensor:
    """All of a parameter of stage 3; every process must ask."""
    import deepspeed

    if parameter.ds_status.name == "AVAILABLE":  # small ones stay gathered
        return parameter.detach().clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def own_part(value: Tensor, parameter: Any) -> Tensor:
    """Of a whole value, the piece that this process holds of `parameter`, padded as that is."""
    size = parameter.ds_tensor.numel()
    flat = value.to(parameter.ds_tensor.device).flatten()
    rank = torch.distributed.get_rank()
    piece = flat[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(piece, (0, size - piece.numel()))


def shape(parameter: Any) -> torch.Size:
    """That of the whole parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def rows(value: Tensor) -> Tensor:
    """A whole tensor, the same in every process, as rows of which each holds its part."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = _mesh(value.device.type)
    part = distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None).to_local()
    # a copy, since the part is a view that would keep the whole
    return DTensor.from_local(
        part.clone(), mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride()
    )


def empty_rows(parameter: Any) -> Tensor:
    """Zeros in the shape of a parameter, as `rows`."""
    from torch.distributed import tensor as distributed

    mesh = _mesh(parameter.device.type)
    return distributed.zeros(
        *shape(parameter), dtype=parameter.dtype, device_mesh=mesh,
        placements=[distributed.Shard(0)],
    )  # fmt: skip


def _mesh(device: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (torch.distributed.get_world_size(),))


@torch.no_grad()
def fill_parts(parameter: Any, value: Tensor) -> None:
    """Copies a whole value, the same in every process, into a trained parameter."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if in_parts(parameter):
        piece = own_part(value, parameter)
        parameter.ds_tensor.copy_(piece)
        if parameter.ds_status.name == "AVAILABLE":
            parameter.data.copy_(value)
        safe_set_local_fp32_param(parameter, piece)
        return
    parameter.copy_(value)
    safe_set_full_fp32_param(parameter, value.to(parameter.device))


# ---- optimizer -----------------------------------------------------------------------------------


def owns(optimizer: Any) -> bool:
    """Whether an optimizer is DeepSpeed's around the one that steps."""
    return type(optimizer).__module__.startswith("deepspeed.")


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, whose groups hold the learning rates."""
    return optimizer.optimizer if owns(optimizer) else optimizer


def _pieces(optimizer: Any) -> list[Tensor]:
    """The flat tensors that this process's optimizer steps."""
    parts = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    return list(optimizer.single_partition_of_fp32_groups if parts is None else parts)


def _link(optimizer: Any) -> None:
    """Tells the parameters of stage 2 where their parts of the state are: by itself DeepSpeed does
    so after the first step of the first group, when the others have no state yet."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, flat in zip(
        getattr(optimizer, "bit16_groups", ()), _pieces(optimizer), strict=False
    ):
        lazy_init_hp_params_optimizer_state(group, flat, inner(optimizer).state)


def optimizer_rows(
    optimizer: Any, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """As `checkpoint.optimizer_state`, every tensor as rows of which each process holds its part;
    every process must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    groups = [
        {k: v for k, v in group.items() if k not in ("params", NAMES)} | {"params": group[NAMES]}
        for group in inner(optimizer).param_groups
    ]
    state = inner(optimizer).state.get(_pieces(optimizer)[0], {})
    _link(optimizer)
    tensors: dict[str, Tensor] = {}
    for name in (name for group in groups for name in group["params"]):
        for key, value in state.items():
            if torch.as_tensor(value).dim() == 0:
                tensors[f"{key}|{name}"] = torch.as_tensor(value)
                continue
            full = safe_get_full_optimizer_state(parameters[name], key)
            tensors[f"{key}|{name}"] = rows(full.view(shape(parameters[name])))
    return tensors, groups


@torch.no_grad()
def load_optimizer_rows(
    optimizer: Any,
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """As `checkpoint.load_optimizer_state`, after the weights: the optimizer's own copies of them
    are made anew here."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    own = inner(optimizer)
    numbers = {key: value for key, value in tensors.items() if value.dim() == 0}
    kinds = {key.partition("|")[0] for key in tensors} - {key.partition("|")[0] for key in numbers}
    steps: dict[str, set[float]] = {}
    for key, value in numbers.items():
        steps.setdefault(key.partition("|")[0], set()).add(float(value))
    if any(len(found) > 1 for found in steps.values()):
        raise ValueError("the checkpoint's parameters were not all trained for as many steps.")
    for flat in _pieces(optimizer):
        own.state[flat] = {kind: torch.zeros_like(flat) for kind in kinds}
        own.state[flat] |= {kind: torch.tensor(min(found)) for kind, found in steps.items()}
    if not in_parts(next(iter(parameters.values()))):
        optimizer.refresh_fp32_params()
    _link(optimizer)
    for key, value in tensors.items():
        kind, _, name = key.partition("|")
        if kind not in kinds:
            continue
        full, parameter = value, parameters[name]
        if is_distributed(full):
            full = full.full_tensor()  # type: ignore[attr-defined]
        if in_parts(parameter):
            safe_set_local_optimizer_state(parameter, own_part(full, parameter), kind)
        else:
            safe_set_full_optimizer_state(parameter, full.to(parameter.device), kind)
    for group, saved in zip(own.param_groups, groups, strict=True):
        group |= {k: tuple(v) if k == "betas" else v for k, v in saved.items() if k != "params"}
