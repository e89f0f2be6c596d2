"""An error in one rank ends both within seconds, with its message, wherever the other one waits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from many_processes import COMMON
from tiny_models import config, save_model, write_data

from prefkern.train.together import GRACE

WORKER = str(Path(__file__).with_name("failing_ranks.py"))
# place -> the rank that fails there: the main process judges while the others wait for its word
PLACES = {
    "loading": 1, "evaluation": 1, "saving": 1, "ddp-backward": 1, "fsdp-backward": 1, "judge": 0,
}  # fmt: skip
JUDGE = """
import time

def judge(row, answers):
    print(f"failed at {time.time()}", flush=True)
    raise RuntimeError("out of paper")
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    model, data = save_model(folder / "model"), write_data(folder / "pairs.jsonl", rows=11)
    for name, more in (("plain", {"save_steps": 1}), ("evaluated", {"eval_dataset": data})):
        options = COMMON | {"loss": ("dpo",), "overwrite_output_dir": True} | more
        settings = config(folder / "out", model, data, **options)
        (folder / f"{name}.json").write_text(json.dumps(settings.as_dict()))
    (folder / "judge.py").write_text(JUDGE)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{x}:"}}\n' for x in "pqrs"))
    judged = config(
        folder / "judged", model, str(prompts), round_data="online", num_rounds=2,
        max_new_tokens=4, keep_unfinished=True,
        judge=f"{folder}/judge.py:judge", num_generations=2, max_steps=2,
    )  # fmt: skip
    (folder / "judged.json").write_text(json.dumps(judged.as_dict()))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, WORKER, str(folder), *PLACES], env=environment, capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {place: json.loads((folder / f"{place}.json").read_text()) for place in PLACES}


@pytest.mark.parametrize("place", PLACES)
def test_both_ranks_end_with_the_message(found, place):
    rank = PLACES[place]
    ended, texts = found[place]["ended"], found[place]["texts"]
    own, other = texts[rank], texts[1 - rank]
    assert None not in ended and 0 not in ended, (ended, other, own)
    judges = "judge.py:judge failed on the prompt 'p:': RuntimeError: out of paper."
    text = judges if place == "judge" else "RuntimeError: out of paper"
    assert own.splitlines()[-1].endswith(text)
    assert re.search(f"process {rank} failed: .*out of paper", other)
    # the look in the store, the grace, and a loaded machine
    assert found[place]["seconds"] < GRACE + 15
