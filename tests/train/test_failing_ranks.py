"""An error in one rank ends both within seconds, with its message, wherever the other one waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from many_processes import COMMON
from tiny_models import config, save_model, write_data

from prefkern.train.together import GRACE

WORKER = str(Path(__file__).with_name("failing_ranks.py"))
PLACES = ("loading", "evaluation", "saving", "ddp-backward", "fsdp-backward")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    model, data = save_model(folder / "model"), write_data(folder / "pairs.jsonl", rows=11)
    for name, more in (("plain", {"save_steps": 1}), ("evaluated", {"eval_dataset": data})):
        options = COMMON | {"loss": ("dpo",), "overwrite_output_dir": True} | more
        settings = config(folder / "out", model, data, **options)
        (folder / f"{name}.json").write_text(json.dumps(settings.as_dict()))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, WORKER, str(folder), *PLACES], env=environment, capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {place: json.loads((folder / f"{place}.json").read_text()) for place in PLACES}


@pytest.mark.parametrize("place", PLACES)
def test_both_ranks_end_with_the_message(found, place):
    ended, (other, own) = found[place]["ended"], found[place]["texts"]
    assert None not in ended and 0 not in ended, (ended, other, own)
    assert own.splitlines()[-1] == "RuntimeError: out of paper"
    assert "process 1 failed: out of paper" in other
    # the look in the store, the grace, and a loaded machine
    assert found[place]["seconds"] < GRACE + 15
