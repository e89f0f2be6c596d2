"""FSDP2 under Accelerate on two processes: the head's weight lies in shards.

    torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py

Runs on two CPU processes (gloo); the branch for GPUs has not been run yet. The loss is computed
inside the head's own module call, where FSDP2 has gathered the weight; nothing reads
`lm_head.weight` from outside.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import tiny
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.preference_model import PreferenceModel


def prepared(model: Any, optimizer: Any, loader: Any) -> tuple[Accelerator, Any, Any, Any]:
    """Model, optimizer and data under FSDP2."""
    if torch.cuda.is_available():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )  # fmt: skip
        accelerator = Accelerator(fsdp_plugin=plugin)
        return accelerator, *accelerator.prepare(model, optimizer(model), loader)
    accelerator = Accelerator(cpu=True)  # whose FSDP is for accelerators: torch's own instead
    mesh = torch.distributed.init_device_mesh("cpu", (accelerator.num_processes,))
    for layer in model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return accelerator, model, *accelerator.prepare(optimizer(model), loader)


def main(pairs: int = 192) -> dict[str, Any]:
    policy, held_out = tiny.start(), tiny.pairs(64, seed=1)
    before = tiny.accuracy(policy, held_out)
    reference = copy.deepcopy(policy)
    if torch.cuda.is_available():
        reference.cuda(int(os.environ["LOCAL_RANK"]))
    accelerator, model, optimizer, loader = prepared(
        PreferenceModel(policy, "tdpo2", ref=reference, beta=0.5),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
        torch.utils.data.DataLoader(
            tiny.pairs(pairs), batch_size=8, collate_fn=PairCollator(tiny.tokenizer())
        ),
    )
    losses = []
    for batch in loader:
        out = model(**batch)
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(out.loss.detach(), "mean").item())
    weight = policy.lm_head.weight
    whole = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    found = {
        "sharded": type(weight).__name__,
        "rows_here": len(weight.to_local()),
        "rows": len(weight),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "before": before,
    }
    if accelerator.is_main_process:
        trained = tiny.model()
        trained.load_state_dict({name.removeprefix("model."): v for name, v in whole.items()})
        found["after"] = tiny.accuracy(trained, held_out)
        print(found, flush=True)
    accelerator.end_training()
    return found


if __name__ == "__main__":
    main()
    os._exit(0)
