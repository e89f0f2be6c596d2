"""`prefkern score` and `sample` on models, files and rows that do not fit: who is to blame, and
what a command leaves that did nothing."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from stored_commands import told, write_lines
from tiny_models import save_model, write_data
from transformers import AutoTokenizer

from prefkern.cli.main import main


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    save_model(folder / "model")
    write_data(folder / "pairs.jsonl", rows=3)
    return folder


def call(verb: str, given: Path, out: Path, *more: object) -> int:
    words = [
        verb, "--dataset", given / "pairs.jsonl", "--output", out, "--disable-tqdm", "--device",
        "cpu", "--max-length", 64, *more,
    ]  # fmt: skip
    words += ["--max-new-tokens", 4] if verb == "sample" else []
    return main([str(word) for word in words])


def test_the_model_that_gives_no_numbers_is_named(given, tmp_path, capsys):
    broken = Path(shutil.copytree(given / "model", tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] *= math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for models in (["--model", broken], ["--model", given / "model", "--ref-model", broken]):
        assert call("score", given, tmp_path / "o.jsonl", *models) == 2
        option = models[-2].lstrip("-").replace("-", "_")
        assert f"{option} {broken} gives log-probabilities that are not finite" in told(capsys)


def test_a_command_that_did_nothing_leaves_nothing(given, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    odd = Path(shutil.copytree(given / "model", tmp_path / "odd"))
    tokenizer = AutoTokenizer.from_pretrained(odd)
    tokenizer.add_tokens([*(f"<{i}>" for i in range(300)), "pq"])
    tokenizer.save_pretrained(odd)
    row = {"prompt": "pq:", "chosen": "a", "rejected": "b"}
    data = write_lines(tmp_path / "d.jsonl", [row])
    for verb in ("sample", "score"):
        assert call(verb, given, out, "--model", odd, "--dataset", data) == 2
        assert "pass the tokenizer that belongs to the model" in told(capsys)
        assert not list(tmp_path.glob(".prefkern-*"))
    # a kill in the first batch leaves the first line alone, which keeps no other command off
    (tmp_path / ".prefkern-o.jsonl.work").write_text('{"prefkern": {"temperature": 3}}\n')
    assert call("sample", given, out, "--model", given / "model") == 0


def test_texts_beside_the_prompts_are_told(given, tmp_path, capsys):
    row = {"prompt": "p:", "system": "Be brief.", "chosen": "x"}
    data = write_lines(tmp_path / "d.jsonl", [row])
    model = given / "model"
    assert call("sample", given, tmp_path / "o.jsonl", "--model", model, "--dataset", data) == 0
    assert "text that no prompt is given: 'system'\n" in capsys.readouterr().err
