"""at_head under FSDP2, DDP and tensor parallelism, gloo ranks against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import answers

WORKER = str(Path(__file__).with_name("head_worker.py"))
CHECKS = [
    *((2, name, adapter) for name in ("fsdp", "ddp") for adapter in ("plain", "lora", "saved")),
    (2, "head_gathered_outside"), (2, "tensor_parallel"),
    *((3, "fsdp_with", what) for what in (
        "unequal tokens", "tied embeddings", "mixed precision", "frozen base", "checkpointing",
        "sharded reference",
    )),
]  # fmt: skip


found = answers(WORKER, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: "-".join(map(str, c)))
def test_gradients_are_those_of_one_process(found, check):
    """In every layout of units; and a head read outside its call, or a model called outside its
    wrapper, is seen to be wrong."""
    world, *call = check
    if text := found(world)[tuple(call)]:
        pytest.fail(text, pytrace=False)
