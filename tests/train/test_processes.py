"""What the trainer refuses of accelerate's settings, and who says that a process failed."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import patch_environment
from tiny_models import config

from prefkern.train import processes, together, zero
from prefkern.train.optimizer import clip
from prefkern.train.processes import Processes, make_accelerator


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision=bf16, the run to bf16=False"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision=fp16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: no"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "under Megatron-LM"),
    ],
)
def test_settings_that_cannot_be_followed(tmp_path, settings, match):
    with patch_environment(**settings), pytest.raises(ValueError, match=match):
        make_accelerator(config(tmp_path, "model", "data"))


def test_deepspeed_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with (
        patch_environment(ACCELERATE_USE_DEEPSPEED="true"),
        pytest.raises(ValueError, match="deepspeed is not installed here"),
    ):
        make_accelerator(config(tmp_path, "model", "data"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sync_ref_model": True}, "sync_ref_model: its reference moves"),
        ({"num_rounds": 2}, "num_rounds, round_data: rounds were not tried"),
        ({"dtype": "bfloat16"}, "dtype=bfloat16: its optimizer holds fp32 weights"),
        ({"slow_learning_rate": 1e-5, "lora_r": 4, "loss": ("dpo_second_reference",)},
         "slow_learning_rate: two speeds"),
    ],
)  # fmt: skip
def test_options_that_deepspeed_cannot_follow(tmp_path, monkeypatch, options, match):
    monkeypatch.setattr(processes, "find_spec", lambda name: name)
    settings = config(tmp_path, "model", "data", **options)
    with (
        patch_environment(ACCELERATE_USE_DEEPSPEED="true"),
        pytest.raises(ValueError, match=match),
    ):
        make_accelerator(settings)


def plugin(**settings) -> SimpleNamespace:
    """As accelerate's is after its file was read."""
    own = {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 8} | settings
    stage = own["zero_optimization"]["stage"]
    return SimpleNamespace(deepspeed_config=own, zero_stage=stage)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"zero_optimization": {"stage": 1}}, r"zero_stage must be one of \(2, 3\), got 1"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
         "offload_param_device: cpu"),
        ({"optimizer": {"type": "AdamW"}}, "has a section 'optimizer'"),
        ({"bf16": {"enabled": True}}, "enables bf16"),
        ({"gradient_clipping": 3.0}, r"gradient_clipping: 3.0 is not the run's max_grad_norm=0.5"),
    ],
)  # fmt: skip
def test_settings_of_deepspeed_that_are_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        zero.settle_plugin(plugin(**settings), config(tmp_path, "model", "data", max_grad_norm=0.5))


def test_the_run_decides_what_deepspeed_counts_and_clips(tmp_path):
    own = plugin()
    for limit in (0.5, 2.0):  # a further run of the process finds what the first one set
        zero.settle_plugin(own, config(tmp_path, "model", "data", max_grad_norm=limit))
        assert own.deepspeed_config["gradient_clipping"] == limit
        assert own.deepspeed_config["gradient_accumulation_steps"] == 1


def test_a_norm_that_deepspeed_could_not_take_is_no_number():
    for told, right in ((-1.0, math.nan), (0.0, 0.0), (2.5, 2.5)):
        accelerator = SimpleNamespace(clip_grad_norm_=lambda p, limit, told=told: told)
        assert clip(accelerator, torch.nn.Linear(1, 1), 1.0).item() == pytest.approx(
            right, nan_ok=True
        )


def test_processes_with_other_data_or_options_are_refused(tmp_path):
    """One process of two stands for both: the other's facts are given."""
    own = config(tmp_path, "model", "data")
    for name, match in (("data", "same data; process 0 has 1, process 1 has 2"),
                        ("option seed", "same option seed")):  # fmt: skip
        other = {f"option {k}": v for k, v in own.as_dict().items()} | {"data": 1}
        other = other | ({"data": 2} if name == "data" else {name: 77})

        class Two(Processes):
            def everyone(self, value, other=other):
                return [value, other]

        with pytest.raises(ValueError, match=match):
            Two(None).check_same(own, data=1)
    elsewhere = dataclasses.replace(own, model="another/place")
    every = {f"option {k}": v for k, v in elsewhere.as_dict().items()} | {"data": 1}

    class Same(Processes):
        def everyone(self, value):
            return [value, every]

    Same(None).check_same(own, data=1)  # the folder of a model may be another on each machine


def test_accelerate_does_not_divide_the_loss(tmp_path):
    """Its own count of micro-batches, from its file, has no say: the loop's denominators have."""
    with patch_environment(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="8"):
        accelerator = make_accelerator(config(tmp_path, "model", "data"))
    assert accelerator.gradient_accumulation_steps == 1


def test_one_process_asks_nobody(tmp_path):
    alone = Processes.of(make_accelerator(config(tmp_path, "model", "data")))
    assert (alone.rank, alone.world, alone.tensor_parallel) == (0, 1, 1)
    assert alone.gather(3) == alone.everyone(3) == alone.to_main(3) == [3]
    assert alone.from_main(lambda: 5) == 5
    with pytest.raises(KeyError, match="as it was"), together.ended_together():
        raise KeyError("as it was")
