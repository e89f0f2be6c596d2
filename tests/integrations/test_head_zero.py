"""at_head under DeepSpeed ZeRO-2 and ZeRO-3, gloo ranks against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import answers

pytest.importorskip("deepspeed")
WORKER = str(Path(__file__).with_name("zero_worker.py"))
CHECKS = [
    *((2, "zero", "3", what) for what in ("tied embeddings", "lora")),
    (2, "zero", "2", "plain"),
    # another number of scored tokens on every rank, none on one
    *((3, "zero", "3", what) for what in ("plain", "saved", "base", "checkpointing",
                                          "sharded reference")),
]  # fmt: skip
MARKED = [pytest.param(check, marks=pytest.mark.slow if check[0] == 3 else ()) for check in CHECKS]


found = answers(WORKER, CHECKS)


@pytest.mark.parametrize("check", MARKED, ids=lambda c: "-".join(map(str, c)))
def test_gradients_are_those_of_one_process(found, check):
    world, *call = check
    if text := found(world)[tuple(call)]:
        pytest.fail(text, pytrace=False)
