"""Ranks of the tests of TRL's trainers under DistributedDataParallel."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import trl_runs as runs

from prefkern.integrations import trl as ours

STEPS = 5


def trainer(cls, folder: str, loss: str, rows: int, *, lora=None, **options):
    policy = runs.model()
    given = {}
    if lora is None:
        given["ref_model"] = runs.perturbed(policy)
    else:
        import peft

        torch.manual_seed(1)
        given["peft_config"] = peft.LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False, **lora
        )
    return cls(
        model=policy,
        args=ours.DPOConfig(
            **runs.settings(
                Path(folder),
                loss_type=loss,
                max_steps=STEPS,
                learning_rate=1e-2,
                per_device_train_batch_size=rows,
                dataloader_drop_last=True,
                **options,
            )
        ),
        train_dataset=runs.pairs(),
        processing_class=runs.tokenizer(),
        **given,
    )


def digest(model: torch.nn.Module) -> str:
    parts = hashlib.sha256()
    for p in model.parameters():
        parts.update(p.detach().numpy().tobytes())
    return parts.hexdigest()


def same_on_all_ranks(model: torch.nn.Module) -> bool:
    every: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(every, digest(model))
    return len(set(every)) == 1


def as_launched() -> None:
    """What a launcher tells accelerate; the group is there already, so no port is opened."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip


def ddp(folder: str, loss: str) -> None:
    """Two ranks of two pairs; the log goes to a file for the comparison with one process."""
    as_launched()
    made = trainer(ours.DPOTrainer, folder, loss, 2)
    made.train()
    assert isinstance(made.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert same_on_all_ranks(made.model)
    if dist.get_rank() == 0:
        (Path(folder) / f"{loss}.json").write_text(json.dumps(runs.history(made)))


FSDP2 = {
    "fsdp": "full_shard",
    "fsdp_config": {
        "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "cpu_ram_efficient_loading": False,
    },
}  # fmt: skip
FSDP_CASES = {
    "sigmoid": {"loss": "sigmoid"},
    "tdpo2": {"loss": "tdpo2"},
    "saved head": {
        "loss": "sigmoid", "lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    },
    "lora on the head": {"loss": "tdpo2", "lora": {"target_modules": ["q_proj", "lm_head"]}},
}  # fmt: skip


def _fsdp_on_cpus() -> None:
    """accelerate reads its FSDP settings on accelerators alone; here on gloo ranks as well."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    own = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def fsdp(folder: str, name: str) -> None:
    """Two ranks of two pairs under accelerate's FSDP2; log and whole weights go to a file."""
    from torch.distributed.tensor import DTensor

    as_launched()
    _fsdp_on_cpus()
    made = trainer(ours.DPOTrainer, folder, rows=2, **FSDP_CASES[name], **FSDP2)
    made.train()
    named = dict(made.model.named_parameters())
    assert all(isinstance(p, DTensor) for p in named.values())
    if made.ref_model is not None:
        assert all(isinstance(p, DTensor) for p in made.ref_model.parameters())
    weights = {n: p.detach().full_tensor().clone() for n, p in named.items()}
    if dist.get_rank() == 0:
        torch.save((runs.history(made), weights), Path(folder) / f"{name}.pt")


class Unwrapped(ours.DPOTrainer):
    """The obvious code: the loss on what unwrap_model gives."""

    def _compute_loss(self, model, inputs, return_outputs):
        return super()._compute_loss(self.accelerator.unwrap_model(model), inputs, return_outputs)


def unwrapped(folder: str, loss: str) -> None:
    """The mutation: refused by name; and without the refusal the ranks drift apart, which
    `same_on_all_ranks` sees."""
    as_launched()
    try:
        trainer(Unwrapped, folder, loss, 2).train()
    except RuntimeError as error:
        assert "outside its DistributedDataParallel wrapper" in str(error), error
    else:
        raise AssertionError("a loss outside the wrapper was not refused")
    from prefkern.integrations.trl import fused_head

    fused_head._inside = lambda wrapper: None
    made = trainer(Unwrapped, folder, loss, 2)
    made.train()
    assert not same_on_all_ranks(made.model), "the mutation was not seen"
