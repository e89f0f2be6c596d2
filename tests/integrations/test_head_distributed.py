"""at_head under FSDP2 and DDP, two gloo ranks against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks

WORKER = str(Path(__file__).with_name("head_worker.py"))


@pytest.mark.parametrize("wrapper", ["fsdp", "ddp"])
def test_gradients_are_those_of_one_process(tmp_path, wrapper):
    """In every layout of units, plain, with LoRA on the head and with a saved head; and a head read
    outside its call, or a model called outside its wrapper, is seen to be wrong."""
    run_ranks(tmp_path, WORKER, wrapper, 2, seconds=240)
