"""Options that nothing reads are told before the first step."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_models import config, save_model, write_data

from prefkern.train import demands
from prefkern.train.recipes.idle import idle_options
from prefkern.train.recipes.table import providers_of
from prefkern.train.run import prepare


def idle(**options) -> list[str]:
    given = dataclasses.replace(config("o", "m", "d"), **{"save_steps": 500, **options})
    return [
        line for line in idle_options(given, providers_of(given, demands.losses_of(given)))
        if line.split(" ")[0] in options
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"lora_alpha": 64}, "lora_r"), ({"eval_steps": 5}, "eval_dataset"),
        ({"num_generations": 4}, "round_data=online"), ({"max_new_tokens": 9}, "round_data=online"),
        ({"ref_model_sync_steps": 3}, "sync_ref_model"),
        ({"value_learning_rate": 1e-3}, "a loss with a value head"),
        ({"mask_weight_decay": 0.5}, "a loss with a mask module"),
        ({"ref_model": "m2", "loss": ("sft",)}, "a loss that compares with a reference"),
        ({"save_total_limit": 2, "save_steps": 0}, "save_steps"),
        ({"num_train_epochs": 3.0, "max_steps": 10}, "max_steps below 1, which overrides it"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_named(options, needed):
    name = next(iter(options))
    assert idle(**options) == [f"{name} is given, and nothing reads it without {needed}"]


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 64, "lora_r": 2}, {"eval_steps": 5, "eval_dataset": "d"},
        {"ref_model_sync_steps": 3, "sync_ref_model": True}, {"ref_model": "m2"},
        {"ref_model": "m2", "loss": ("gkd",)}, {"ref_model": "m2", "loss": ("kto",)},
        {"save_total_limit": 2}, {"num_train_epochs": 3.0, "max_steps": -1},
        {"num_generations": 4, "round_data": "online", "judge": "f.py:f"},
    ],
)  # fmt: skip
def test_an_option_with_an_effect_is_not(options):
    assert idle(**options) == []


def test_a_split_of_data_without_splits_is_named(tmp_path):
    data = write_data(tmp_path / "d.jsonl")
    told = [f"dataset_split is given, and nothing reads it without splits, which dataset {data} "]
    assert idle(dataset=data, dataset_split="validation") == [told[0] + "has none of"]
    assert idle(dataset="of/the-hub", dataset_split="validation") == []


def test_a_run_says_it(tmp_path, capsys):
    model, data = save_model(tmp_path / "m"), write_data(tmp_path / "d.jsonl")
    given = config(tmp_path / "o", model, data, lora_alpha=64)
    prepare(given)
    assert "lora_alpha is given, and nothing reads it without lora_r" in capsys.readouterr().err
    prepare(dataclasses.replace(given, ref_model=model), training=False)
    assert "is given" not in capsys.readouterr().err
