"""The processes of a run: accelerate's, and which of them score other data than the others.

Collectives of a run, all of them called by every process in the same order: those of the wrapped
forward and backward (gradients; weights, where they are sharded), the norm of the gradients, one
gather per logged row and evaluation, one per micro-batch for losses with a memory and for kto's
baseline, and those of a checkpoint. Which of them come follows from the options, the data and the
step number, which all processes share: a process with too few micro-batches fills in with another's
and counts 0. What can differ between processes is an error, and `together` ends all of them then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from . import together, zero
from .config import TrainConfig
from .inputs import PATHS
from .waiting import others_wait

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """Who takes which micro-batch. Processes that share one model by tensor parallelism take the
    same, and count as one here."""

    accelerator: Any
    rank: int = 0
    world: int = 1
    tensor_parallel: int = 1

    @classmethod
    def of(cls, accelerator: Any) -> Processes:
        """Those of a run."""
        settings = accelerator.parallelism_config
        if settings is not None and settings.tp_enabled:
            return cls(accelerator, tensor_parallel=settings.tp_size)
        return cls(accelerator, accelerator.process_index, accelerator.num_processes)

    def gather(self, value: Any) -> list[Any]:
        """One entry per process that takes other micro-batches."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value)
        return found

    def everyone(self, value: Any) -> list[Any]:
        """One entry per process."""
        if self.accelerator.num_processes == 1:
            return [value]
        found: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(found, value)
        return found

    def to_main(self, value: Value) -> list[Value] | None:
        """In the main process one entry per process that takes other micro-batches; the others get
        None."""
        if self.world == 1:
            return [value]
        main = self.accelerator.is_main_process
        found: list[Any] | None = [None] * self.world if main else None
        torch.distributed.gather_object(value, found, dst=0)
        return found

    def check_same(self, config: TrainConfig, **facts: Any) -> None:
        """Refuses a run whose processes would part ways: what they call together follows from the
        options and from `facts`, plain values. Paths may differ between machines.

        Raises:
            ValueError: in every process, naming what differs and where.
        """
        own = {f"option {k}": v for k, v in config.as_dict().items() if k not in PATHS} | facts
        every = self.everyone(own)
        for name, value in every[0].items():
            other = next((i for i, found in enumerate(every) if found[name] != value), None)
            if other is not None:
                raise ValueError(
                    f"the processes of a run must have the same {name}; process 0 has {value}, "
                    f"process {other} has {every[other][name]}: start all of them with the same "
                    "options, on the same data."
                )

    def from_main(self, make: Callable[[], Value]) -> Value:
        """What `make()` gives in the main process, however long it takes; a ValueError or OSError
        of it is raised in every process."""
        if self.accelerator.num_processes == 1:
            return make()
        found: list[Any] = [None, None]
        with others_wait(self.accelerator):
            if self.accelerator.is_main_process:
                try:
                    found[0] = make()
                except (ValueError, OSError) as error:
                    found[1] = error
        torch.distributed.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise found[1]
        return found[0]


def make_accelerator(config: TrainConfig) -> Any:
    """The processes and trackers of a run, as `accelerate launch` or torchrun started them.

    Raises:
        ValueError: settings of accelerate's that this trainer cannot follow, with what to do.
    """
    from accelerate import Accelerator, tracking
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, patch_environment

    # accelerate leaves out trackers that are not installed without a word
    known_trackers = ["all", *(str(name) for name in tracking.get_available_trackers())]
    if lacking := [name for name in config.report_to if name not in known_trackers]:
        raise ValueError(
            f"report_to: {', '.join(lacking)} is not installed here or no tracker of accelerate's; "
            f"available: {', '.join(known_trackers[1:]) or 'none'}; leave report_to out for none."
        )
    _check_environment(config)
    on_cpu = config.device == "cpu"
    # what an earlier run in this process set, see _shard_on_cpu
    before = AcceleratorState._shared_state.get("parallelism_config") if on_cpu else None
    if before is not None:
        AcceleratorState._shared_state["parallelism_config"] = None
    with patch_environment(ACCELERATE_USE_PARALLELISM_CONFIG="false") if on_cpu else nullcontext():
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="no",  # autocast is the step's own, so that evaluation has the same
            # the loop counts micro-batches itself; a plugin goes before accelerate's environment
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(config.report_to) or None,
            project_dir=config.output_dir,
        )
    if on_cpu:
        _shard_on_cpu(accelerator, before)
    _check_kind(accelerator)
    if zero.stage_of(accelerator):
        zero.settle_plugin(accelerator.state.deepspeed_plugin, config)
    together.watch(accelerator)
    return accelerator


def _set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def _check_environment(config: TrainConfig) -> None:
    """Refuses what accelerate's file asks for and the options do not, before it has an effect."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16") or (precision == "bf16" and not config.bf16):
        raise ValueError(
            f"accelerate is set to mixed_precision={precision}, the run to bf16={config.bf16}: "
            "this trainer computes in fp32 or, with --bf16, in bfloat16; set mixed_precision: "
            f"{'bf16' if config.bf16 else 'no'} there, or pass --bf16."
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(
            "accelerate is set to a dynamo_backend; this trainer's step is not compiled as a "
            "whole: set dynamo_backend: no."
        )
    if _set("ACCELERATE_USE_DEEPSPEED"):
        if find_spec("deepspeed") is None:
            raise ValueError(
                "accelerate is set to distributed_type: DEEPSPEED, and deepspeed is not installed "
                "here; install it, or set distributed_type: FSDP with fsdp_version: 2."
            )
        zero.check_options(config)
    if _set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "this trainer does not run under Megatron-LM; set distributed_type: FSDP with "
            "fsdp_version: 2."
        )


def _shard_on_cpu(accelerator: Any, before: Any) -> None:
    """accelerate leaves its settings of FSDP out of account on CPUs and refuses tensor parallelism
    there; both work over gloo."""
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if before is not None:
        state.parallelism_config = before
        return
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    if _set("ACCELERATE_USE_DEEPSPEED"):
        zero.start_on_cpu(accelerator)
        return
    if _set("ACCELERATE_USE_FSDP"):
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if _set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        state.parallelism_config = ParallelismConfig()
        state.device_mesh = state.parallelism_config.get_device_mesh("cpu")


def _check_kind(accelerator: Any) -> None:
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import CPUOffloadPolicy

    kind = accelerator.distributed_type
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if kind not in (*plain, DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "this trainer runs on one device, with DistributedDataParallel, FSDP2 or DeepSpeed, "
            f"not with {kind}; set distributed_type: MULTI_GPU or FSDP in accelerate's file."
        )
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError("FSDP1 is not supported; set fsdp_version: 2 in accelerate's file.")
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise ValueError("fsdp_offload_params is not supported; set it to false.")
        if plugin.activation_checkpointing:
            raise ValueError(
                "fsdp_activation_checkpointing is not supported, since it renames weights; set it "
                "to false and pass --gradient-checkpointing."
            )
    settings = accelerator.parallelism_config
    if settings is not None and (settings.cp_enabled or settings.sp_enabled):
        raise ValueError(
            "parallelism_config: this trainer shards models (dp_shard_size, tp_size), not "
            "sequences; set cp_size and sp_size to 1."
        )
    alone = kind != DistributedType.FSDP
    tensor = settings is not None and settings.tp_enabled
    if tensor and not (alone and settings.tp_size == accelerator.num_processes):
        raise ValueError(
            "parallelism_config: tensor parallelism is over all processes here and without FSDP, "
            f"got tp_size={settings.tp_size} of {accelerator.num_processes} processes; leave "
            "tp_size out, and FSDP shards the model over all of them."
        )
