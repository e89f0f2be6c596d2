"""Ranks of the tests of at_head under data parallelism; each function is one of them.

The truth is the gradient of the mean over ranks of each rank's loss, from one process.
"""

from __future__ import annotations

from typing import Any

import bench_package  # noqa: F401
import torch
import torch.distributed as dist
from families import family_model
from head_batches import batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import prefkern
from benchmarks.traffic import traffic
from prefkern.integrations.head import at_head
from prefkern.integrations.reference import frozen_view

LAYOUTS = ("head in the root", "head alone", "norm and head kept", "norm and head resharded")


def models(adapter: str, **config: Any) -> tuple[nn.Module, nn.Module]:
    """(policy, reference), the same on all ranks."""
    policy = family_model("llama", **config)
    reference = family_model("llama", seed=5).requires_grad_(False)
    if adapter != "plain":
        import peft

        torch.manual_seed(1)
        on = {"lora": {"target_modules": ["q_proj", "lm_head"]},
              "base": {"target_modules": ["q_proj", "v_proj"]},
              "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}  # fmt: skip
        policy = peft.get_peft_model(
            policy, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **on[adapter])
        )
    for model in (policy, reference):
        at_head(model)
    return policy, reference


def rows(rank: int, world: int = 2) -> tuple[dict, Tensor]:
    """Other tokens on every rank. Of three, the second brings none that counts and the third a
    longer answer than the first."""
    inputs, targets = batch(rows=2, length=11 if world == 2 else 9 + rank)
    shift = 13 * rank
    ids = (inputs["input_ids"] + shift - 3) % 250 + 3
    targets = torch.where(targets < 0, targets, (targets + shift) % 250)
    if world > 2 and rank == 1:
        targets = torch.full_like(targets, -100)
    return inputs | {"input_ids": ids}, targets


def loss_of(model: nn.Module, reference: nn.Module, rank: int, weight=None) -> Tensor:
    """A rank's loss. `weight`: read the head from outside its call, as others do."""
    inputs, targets = rows(rank, dist.get_world_size())
    kept = reference(**inputs, at_head=frozen_view).value

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


def truth(adapter: str, **config: Any) -> dict[str, Tensor]:
    policy, reference = models(adapter, **config)
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


def shard(model: nn.Module, layout: str, **options: Any) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in base.model.layers:
        fully_shard(block, mesh=mesh, **options)
    if layout == "head alone":
        fully_shard(base.lm_head, mesh=mesh, **options)
    elif "norm" in layout:
        tail = [base.model.norm, base.lm_head]
        fully_shard(tail, mesh=mesh, reshard_after_forward="kept" not in layout, **options)
    fully_shard(model, mesh=mesh, **options)


def fsdp(adapter: str) -> None:
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


def fsdp_with(what: str) -> None:
    """Three ranks with other numbers of scored tokens, one with none."""
    adapter = "base" if what == "frozen base" else "plain"
    config = {"tie_word_embeddings": True} if what == "tied embeddings" else {}
    # the embedding and a tied head are one parameter, which one unit must hold
    layouts = ("head in the root",) if config else LAYOUTS[1:]
    want = truth(adapter, **config)
    for layout in layouts:
        policy, reference = models(adapter, **config)
        options, bound = {}, 2e-5
        if what == "mixed precision":
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            bound = 5e-2
        if what == "checkpointing":
            policy.train()
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        shard(policy, layout, **options)
        if what == "sharded reference":
            shard(reference, layout)
        loss_of(policy, reference, dist.get_rank()).backward()
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        assert all(p.dtype == torch.float32 for p in policy.parameters())  # the master's
        error = worst(policy, want)
        assert error < bound, f"{what}, {layout}: {error}"


def head_gathered_outside() -> None:
    """What at_head is there to avoid: the head gathered outside its own call hands each rank its
    own gradient alone."""
    policy, reference = models("plain")
    shard(policy, "head alone")
    loss = loss_of(policy, reference, dist.get_rank(), lambda: policy.lm_head.weight.full_tensor())
    loss.backward()
    assert worst(policy, truth("plain")) > 0.1


def ddp(adapter: str) -> None:
    want = truth(adapter)
    policy, reference = models(adapter)
    wrapped = nn.parallel.DistributedDataParallel(policy)
    loss_of(wrapped, reference, dist.get_rank()).backward()
    assert worst(policy, want) < 2e-5

    policy, reference = models(adapter)
    nn.parallel.DistributedDataParallel(policy)
    loss_of(policy, reference, dist.get_rank()).backward()  # outside its wrapper
    assert worst(policy, want) > 0.1


def tensor_parallel() -> None:
    """By transformers' own plan: every rank scores the same tokens by its rows of both heads, and
    neither head is gathered."""
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    whole, reference = models("plain")
    want_loss = loss_of(whole, reference, 0)
    want_loss.backward()
    want = {n: p.grad for n, p in whole.named_parameters()}
    policy, reference = models("plain")
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    for model in (policy, reference):
        plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_size=world))
        apply_tensor_parallelism(model, mesh, plan)
        at_head(model)
        assert isinstance(model.lm_head.weight, DTensor)
    with traffic() as found:
        loss = loss_of(policy, reference, 0)
        loss.backward()
    rows_here = policy.lm_head.weight.to_local().nbytes
    assert 0 < max(size for _, size in found.calls) < rows_here / 4
    assert abs(loss - want_loss) < 1e-5
    assert worst(policy, want) < 2e-5
