"""A model's folder that cannot be read: the file at fault and the cause, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import config, save_model

from prefkern.train import model_files, models


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("materials") / "model")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is damaged or not whole \(Expect"),
        ("config.json", "[]", r"config\.json holds no JSON object"),
        ("tokenizer.json", None, r"the folder holds none \(tokenizer\.json, "),
        ("config.json", None, "holds no config.json, so it is no model folder"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
    ],
)
def test_the_file_of_a_folder_that_is_at_fault_is_named(tmp_path, model, file, text, words):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "notes.json").write_text("{")  # none of the model's
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(ValueError, match=words):
        models.load_tokenizer(str(folder))


def test_weights_that_are_not_there(tmp_path, model):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    assert "model.safetensors.index.json names no file of weights" in model_files.fault(folder, "")
    (folder / "model.safetensors.index.json").unlink()
    assert model_files.fault(folder, "model") == ""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=r"its file of weights \(\.bin\) is damaged, or holds more"
    ):
        models.load_model(str(folder), config("o", "m", "d"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "holds no weights (adapter_model.safetensors)" in model_files.fault(adapter, "adapter")
