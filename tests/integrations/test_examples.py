"""Examples that need other libraries or two processes."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys

import pytest
from doc_blocks import ROOT

FOLDER = ROOT / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_trl_trainer(example):
    pytest.importorskip("trl")
    found = example("trl_trainer").main()
    assert found["before"] < 0.2 and found["after"] > 0.9
    assert found["last_margin"] > found["first_margin"] + 0.5


@pytest.mark.slow
def test_fsdp2_on_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    found = subprocess.run(
        [*command, str(FOLDER / "accelerate_fsdp2.py")], cwd=tmp_path, text=True, timeout=300,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("{")]
    row = ast.literal_eval(line)
    assert row["sharded"] == "DTensor" and row["rows_here"] < row["rows"]
    assert row["before"] < 0.2 and row["after"] > 0.9
    assert row["last_loss"] < 0.8 * row["first_loss"]
