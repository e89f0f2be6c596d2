"""The configuration: YAML, coercion, refusals with the nearest names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefkern.cli.options import parse_loss_args
from prefkern.train.config import TrainConfig, check_same_run
from prefkern.train.read_config import from_mapping, read_yaml

REQUIRED = {"model": "m", "dataset": "d"}


def test_mapping_is_coerced_to_field_types():
    config = from_mapping(
        {
            **REQUIRED,
            "learning-rate": "1e-5",
            "packing": True,
            "loss_args": {"alpha": 0.5},
            "num_train_epochs": 2,
            "loss_weights": [1, 0.5],
            "loss": ["tdpo2", "sft"],
            "ref_model": None,
        }
    )
    assert config.loss == ("tdpo2", "sft") and config.learning_rate == 1e-5
    assert config.packing == "on" and config.num_train_epochs == 2.0
    assert from_mapping(config.as_dict()) == config


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({**REQUIRED, "leraning_rate": 1}, r"unknown key 'leraning_rate'; nearest: learning_rate"),
        ({"model": "m"}, "dataset must be given"),
        ({**REQUIRED, "max_length": "many"}, "max_length must be int, got 'many'"),
        ({**REQUIRED, "bf16": "yes please"}, "bf16 must be bool"),
        ({**REQUIRED, "packing": "maybe"}, r"packing must be one of \['auto', 'on', 'off'\]"),
        ({**REQUIRED, "loss": []}, "at least one loss"),
        ({**REQUIRED, "loss_weights": [1.0, 2.0]}, "one number per loss, got 2 for 1"),
        ({**REQUIRED, "token_budget": 100, "packing": "off"}, "token_budget packs"),
        ({**REQUIRED, "lora_dropout": 0.1}, "disable_dropout=False"),
        ({**REQUIRED, "precomputed_ref": "x", "reference": "model"}, "precomputed_ref replaces"),
        (
            {**REQUIRED, "gradient_accumulation_steps": 0},
            "gradient_accumulation_steps must be >= 1, got 0",
        ),
    ],
)
def test_mistakes_name_the_key_and_what_to_do(values, match):
    with pytest.raises(ValueError, match=match):
        from_mapping(values)


def test_yaml_files(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndataset: d\nloss: [dpo, sft]\nlearning_rate: 1e-5\n")
    assert from_mapping(read_yaml(file)).loss == ("dpo", "sft")
    file.write_text("just text")
    with pytest.raises(ValueError, match=r"run\.yaml: expected `key: value`"):
        read_yaml(file)
    file.write_bytes(b"\xff\xfe\x00bad: [")
    with pytest.raises(ValueError, match="not a readable YAML"):
        read_yaml(file)


def test_loss_args_are_read_as_yaml_values():
    found = parse_loss_args(["alpha=0.5", "normalize=sum", "rw-kl-independent=false", "beta=1e-3"])
    assert found == {"alpha": 0.5, "normalize": "sum", "rw_kl_independent": False, "beta": 1e-3}
    given = {**REQUIRED, "loss_args": {"beta": "1e-3", "norm": "sum"}, "columns": {"prompt": "1"}}
    config = from_mapping(given)  # YAML 1.1 reads 1e-3 as a text
    assert config.loss_args == {"beta": 1e-3, "norm": "sum"} and config.columns == {"prompt": "1"}
    with pytest.raises(ValueError, match="name=value"):
        parse_loss_args(["alpha"])


def test_a_resumed_run_must_be_the_same_run():
    config = TrainConfig(**REQUIRED)
    check_same_run(
        config.as_dict(), TrainConfig(**REQUIRED, logging_steps=3, output_dir="elsewhere")
    )
    with pytest.raises(ValueError, match=r"learning_rate: was 1e-06, is 0\.1"):
        check_same_run(config.as_dict(), TrainConfig(**REQUIRED, learning_rate=0.1))


def test_import_prefkern_takes_no_trainer_packages():
    code = (
        "import sys, prefkern; "
        "bad = {'transformers', 'datasets', 'accelerate', 'peft', 'tyro'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
