"""What the trainer refuses of accelerate's settings, and who says that a process failed."""

from __future__ import annotations

import pytest
from accelerate.utils import patch_environment
from tiny_models import config

from prefkern.train import together
from prefkern.train.processes import Processes, make_accelerator


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision=bf16, the run to bf16=False"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision=fp16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: no"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "under DeepSpeed; set distributed_type: FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "under Megatron-LM"),
    ],
)
def test_settings_that_cannot_be_followed(tmp_path, settings, match):
    with patch_environment(**settings), pytest.raises(ValueError, match=match):
        make_accelerator(config(tmp_path, "model", "data"))


def test_accelerate_does_not_divide_the_loss(tmp_path):
    """Its own count of micro-batches, from its file, has no say: the loop's denominators have."""
    with patch_environment(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="8"):
        accelerator = make_accelerator(config(tmp_path, "model", "data"))
    assert accelerator.gradient_accumulation_steps == 1


def test_one_process_asks_nobody(tmp_path):
    processes = Processes.of(make_accelerator(config(tmp_path, "model", "data")))
    assert (processes.rank, processes.world, processes.tensor_parallel) == (0, 1, 1)
    assert processes.gather(3) == processes.everyone(3) == [3]
    assert processes.from_main(lambda: 5) == 5
    with pytest.raises(KeyError, match="as it was"), together.ended_together():
        raise KeyError("as it was")
