"""Ranks of the tests of at_head under DeepSpeed ZeRO; each function is one of them.

The truth is that of head_worker.py: one process's gradient of the mean over ranks.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from head_worker import loss_of, models, truth
from torch import Tensor, nn

os.environ["DS_ACCELERATOR"], os.environ["LOCAL_RANK"] = "cpu", "0"


def settings(stage: int) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def engine_of(model: nn.Module, stage: int) -> Any:
    """`model` partitioned over the ranks, with an optimizer where it trains."""
    import deepspeed

    # its collectives through shared memory are C++ that it would compile here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=0.1) if moving else None
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))[0]


def worst(model: nn.Module, want: dict[str, Tensor]) -> float:
    """Largest relative error of a parameter's gradient; every parameter counts, so does NaN."""
    from deepspeed.utils import safe_get_full_grad

    found = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    errors = [((found[n] - w).norm() / w.norm()).item() for n, w in want.items()]
    return max(errors) if all(e == e for e in errors) else float("inf")


def zero(stage: str, what: str) -> None:
    """Gradients of one process, after one micro-batch and after two."""
    adapter = what if what in ("lora", "saved", "base") else "plain"
    config = {"tie_word_embeddings": True} if what == "tied embeddings" else {}
    want = truth(adapter, **config)
    policy, reference = models(adapter, **config)
    if what == "checkpointing":
        policy.train()
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    engine = engine_of(policy, int(stage))
    if what == "sharded reference":
        reference = engine_of(reference, int(stage))
        assert all(p.numel() == 0 for p in reference.parameters())
    if stage == "3":
        assert all(p.numel() == 0 for p in policy.parameters())  # the parts are elsewhere
    for number in (1, 2):
        engine.set_gradient_accumulation_boundary(number == 2)
        engine.backward(loss_of(engine, reference, dist.get_rank()))
    assert sum(p.numel() for p in policy.parameters()) == 0 or stage == "2"
    error = worst(policy, {n: 2 * w for n, w in want.items()})
    assert error < 2e-5, f"stage {stage}, {what}: {error}"
