"""One rank of a two-rank run (started by test_ddp.py)."""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from prefkern.train import train
from prefkern.train.loop import train_run
from prefkern.train.read_config import from_mapping
from prefkern.train.run import prepare

faulthandler.dump_traceback_later(200, exit=True)  # a rank that waits says where
settings, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
if settings.get("num_rounds", 1) > 1:
    train(from_mapping(settings))
else:
    run = prepare(from_mapping(settings))
    train_run(run)
    state = {k: v.detach().clone().contiguous() for k, v in run.step.named_parameters()}
    save_file(state, folder / f"rank{run.rank}.safetensors")
