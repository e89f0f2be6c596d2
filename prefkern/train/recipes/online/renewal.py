"""Answers sampled anew every few steps of a run, whose model and optimizer stay as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import TrainConfig
from ...providers import Provider
from ...run import Run, make_loader
from ...waiting import others_wait
from .answers import NothingToTrain
from .round_data import Sampler

FILE = "samples.jsonl"  # in a checkpoint: the rows that are trained on


class Renewal(Provider):
    """Replaces the examples of a run every config.sample_every steps.

    Args:
        sampler: Of the run's own policy.
        run: The run; its data are those of the round's start.
        first: Number of the sampling that made them; each one after it counts on, so that its
            prompts and its seed are its own.
    """

    def __init__(self, sampler: Sampler, run: Run, *, first: int) -> None:
        super().__init__(run.config, run.records)
        self.sampler, self.run, self.first = sampler, run, first
        self.every = sampler.config.sample_every
        self.done = 0  # samplings since the start of the run
        self.rows: list[dict[str, Any]] = []  # of the last one
        self.facts: dict[str, float] = {}

    def renew(self, step: int) -> bool:
        due = step // self.every
        if due <= self.done:
            return False
        self.done, why = due, ""
        table: list[dict[str, Any]] = []
        facts: dict[str, float] = {}
        accelerator = self.sampler.accelerator
        with others_wait(accelerator):
            try:
                table, facts = self.sampler.rows(self.first + due)
            except NothingToTrain as error:
                why = str(error)
        table, facts, why = shared(accelerator, (table, facts, why))
        if why:
            self.run.say(f"step {step}: {why} The samples before are trained on until the next.")
            return False
        self._use(table, facts)
        return True

    def _use(self, table: list[dict[str, Any]], facts: dict[str, float]) -> None:
        run = self.run
        loader = make_loader(run.config, run.tokenizer, run.step.policy, run.providers)
        data = loader.load(table)
        for provider in run.providers:
            data = data._replace(examples=provider.on_examples(data.examples))
        run.data, self.rows, self.facts = data, table, facts
        run.step.loss_args |= self.sampler.maker.loss_args(facts)

    def metrics(self) -> dict[str, Tensor]:
        return {f"online/{k}": torch.tensor(float(v)) for k, v in self.facts.items()}

    def state(self) -> dict[str, Any]:
        return {"samplings": self.done, "sampled": self.facts}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.done, self.facts = saved["samplings"], saved["sampled"]

    def save(self, folder: Path) -> None:
        if self.rows:
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            (folder / FILE).write_text(lines, encoding="utf-8")

    def load(self, folder: Path) -> None:
        if (folder / FILE).is_file():
            lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
            self._use([json.loads(line) for line in lines], self.facts)


def samplings_per_round(config: TrainConfig) -> int:
    """How often a round samples, the one before its first step among them."""
    return math.ceil(config.max_steps / config.sample_every) if config.sample_every else 1


def shared(accelerator: Any, value: Any) -> Any:
    """The main process's value, on every process."""
    if accelerator.num_processes == 1:
        return value
    box = [value if accelerator.is_main_process else None]
    torch.distributed.broadcast_object_list(box)
    return box[0]
