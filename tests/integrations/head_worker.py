"""Ranks of the tests of at_head under data parallelism; each function is one of them.

The truth is the gradient of the mean over ranks of each rank's loss, from one process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from families import family_model
from head_batches import batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import prefkern
from prefkern.integrations.head import at_head
from prefkern.integrations.reference import constant

LAYOUTS = ("head in the root", "head alone", "norm and head kept", "norm and head resharded")


def models(adapter: str) -> tuple[nn.Module, nn.Module]:
    """(policy, reference), the same on all ranks."""
    policy = family_model("llama")
    reference = family_model("llama", seed=5).requires_grad_(False)
    if adapter:
        import peft

        torch.manual_seed(1)
        on = {"lora": {"target_modules": ["q_proj", "lm_head"]},
              "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}  # fmt: skip
        policy = peft.get_peft_model(
            policy, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **on[adapter])
        )
    for model in (policy, reference):
        at_head(model)
    return policy, reference


def rows(rank: int) -> tuple[dict, Tensor]:
    inputs, targets = batch(rows=2)
    shift = 13 * rank
    ids = (inputs["input_ids"] + shift - 3) % 250 + 3
    return inputs | {"input_ids": ids}, torch.where(targets < 0, targets, (targets + shift) % 250)


def loss_of(model: nn.Module, reference: nn.Module, rank: int, weight=None) -> Tensor:
    """A rank's loss. `weight`: read the head from outside its call, as others do."""
    inputs, targets = rows(rank)
    kept = reference(**inputs, at_head=constant).value

    def objective(view):
        with kept.gathered() as head:
            own = view.head if weight is None else prefkern.Head(weight())
            return prefkern.preference_loss(
                view.hidden, own, targets, loss="tdpo2", beta=0.5, ref_hidden=kept.hidden,
                ref_head=head, metrics=False,
            )[0]  # fmt: skip

    if weight is None:
        return model(**inputs, at_head=objective).value
    found = model(**inputs, at_head=lambda view: view).value
    return objective(found)


def truth(adapter: str) -> dict[str, Tensor]:
    policy, reference = models(adapter)
    world = dist.get_world_size()
    for rank in range(world):
        (loss_of(policy, reference, rank) / world).backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


def worst(model: nn.Module, want: dict[str, Tensor]) -> float:
    """Largest relative error of a parameter's gradient; every parameter counts, so does NaN."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    errors = [((found[n] - w).norm() / w.norm()).item() for n, w in want.items()]
    return max(errors) if all(e == e for e in errors) else float("inf")


def shard(model: nn.Module, layout: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in base.model.layers:
        fully_shard(block, mesh=mesh)
    if layout == "head alone":
        fully_shard(base.lm_head, mesh=mesh)
    elif "norm" in layout:
        tail = [base.model.norm, base.lm_head]
        fully_shard(tail, mesh=mesh, reshard_after_forward="kept" not in layout)
    fully_shard(model, mesh=mesh)


ADAPTERS = ("", "lora", "saved")


def fsdp() -> None:
    for adapter in ADAPTERS:
        _fsdp(adapter)
    _gathered_outside()


def _fsdp(adapter: str) -> None:
    want = truth(adapter)
    for layout in LAYOUTS:
        for accumulate in (False, True):
            policy, reference = models(adapter)
            shard(policy, layout)
            if accumulate:  # two micro-batches, gradients synchronised at the second
                policy.set_requires_gradient_sync(False)
                loss_of(policy, reference, dist.get_rank()).backward()
                policy.set_requires_gradient_sync(True)
            loss_of(policy, reference, dist.get_rank()).backward()
            scaled = {n: w * (2 if accumulate else 1) for n, w in want.items()}
            error = worst(policy, scaled)
            assert error < 2e-5, f"{layout}, accumulate={accumulate}: {error}"


def _gathered_outside() -> None:
    """What at_head is there to avoid: the head gathered outside its own call hands each rank its
    own gradient alone."""
    policy, reference = models("")
    shard(policy, "head alone")
    loss = loss_of(policy, reference, dist.get_rank(), lambda: policy.lm_head.weight.full_tensor())
    loss.backward()
    assert worst(policy, truth("")) > 0.1


def ddp() -> None:
    for adapter in ADAPTERS:
        _ddp(adapter)


def _ddp(adapter: str) -> None:
    want = truth(adapter)
    policy, reference = models(adapter)
    wrapped = nn.parallel.DistributedDataParallel(policy)
    loss_of(wrapped, reference, dist.get_rank()).backward()
    assert worst(policy, want) < 2e-5

    policy, reference = models(adapter)
    nn.parallel.DistributedDataParallel(policy)
    loss_of(policy, reference, dist.get_rank()).backward()  # outside its wrapper
    assert worst(policy, want) > 0.1
