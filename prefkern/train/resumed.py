"""Whether a checkpoint is of this run, and what changes where other processes continue it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .config import check_same_run
from .run import Run


def check_continued(run: Run, checkpoint: Path, saved: dict[str, Any]) -> None:
    """Refuses a checkpoint of another run."""
    check_same_run(saved["config"] | _world(checkpoint, saved, run), run.config)
    if saved["data"] != run.data_hash:
        raise ValueError(f"{checkpoint} was written by a run on other data; restore the data set.")
    if saved["packed"] != run.packed:
        raise ValueError(
            f"{checkpoint} was trained on {'packed' if saved['packed'] else 'padded'} batches, "
            f"which is not the choice here; set packing={'on' if saved['packed'] else 'off'}."
        )


def _world(checkpoint: Path, saved: dict[str, Any], run: Run) -> dict[str, Any]:
    """What may differ where another number of processes continues a run: as many micro-batches
    as before must make up a step.

    Raises:
        ValueError: they do not, with the gradient_accumulation_steps that would.
    """
    before, now = saved["world"], run.world
    each = saved["config"]["gradient_accumulation_steps"]
    if before == now:
        return {}
    if before * each != now * run.config.gradient_accumulation_steps:
        fits = before * each % now == 0
        what = (
            f"pass gradient_accumulation_steps={before * each // now}"
            if fits
            else f"start a number of processes that divides {before * each}"
        )
        raise ValueError(
            f"{checkpoint} was written by {before} processes with {each} micro-batches per step "
            f"each, this run has {now} with {run.config.gradient_accumulation_steps}: {what}."
        )
    return {"gradient_accumulation_steps": run.config.gradient_accumulation_steps}


def other_world(run: Run, saved: dict[str, Any]) -> None:
    """New generators where another number of processes continues a run, and a word of it."""
    torch.manual_seed(run.config.seed + run.rank + 1_000_003 * (1 + saved["step"]))
    run.say(
        "the checkpoint was written by another number of processes: the run continues to "
        "rounding, not to the same bits; dropout, where it is on, draws anew."
    )
    if any(provider.counts_rounds for provider in run.providers):
        run.say(
            "losses with a memory, and baselines over all rows, see as many micro-batches at a "
            "time as there are processes: their numbers differ from here on."
        )
