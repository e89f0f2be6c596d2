"""Means of metrics over steps and processes, and where the rows go: JSON lines, trackers, bar."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .data import Example
from .output import writing
from .sharded import size

DIFFERENCE = "chosen minus rejected"  # stands for "margins" that follow from two other means


class Meter:
    """Weighted means that are only read, and only synchronised, when a row is logged."""

    def __init__(self, saved: dict[str, list[float]] | None = None) -> None:
        self.sums: dict[str, list[Any]] = {k: list(v) for k, v in (saved or {}).items()}

    def add(self, name: str, value: Tensor | float, weight: float = 1.0) -> None:
        entry = self.sums.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + (value.double() if isinstance(value, Tensor) else value) * weight
        entry[1] += weight

    def add_means(self, metrics: Mapping[str, Tensor], examples: list[Example]) -> None:
        """The means of one batch, each weighted by what it is a mean over; shares are left out."""
        counts = _Counts(metrics, examples)
        for name, value in metrics.items():
            if counts.unpaired and name.endswith("/margins"):
                # of two means over rows of their own, which only the whole data give
                self.add(name.replace("margins", DIFFERENCE), 0.0, 0.0)
            elif not is_share(name):
                self.add(name, value, counts.of(name))

    def consolidate(self, keeps: bool) -> None:
        """Moves the sums of all processes to the one that keeps them, unchanged in total."""
        totals = self._gathered()
        self.sums = totals if keeps else {}

    def state(self) -> dict[str, list[float]]:
        """Plain sums [total, weight], for a checkpoint."""
        return {k: [float(total), float(count)] for k, (total, count) in self.sums.items()}

    def pop(self) -> dict[str, float]:
        """Means over all processes since the last pop; every process gets them."""
        totals = self._gathered()
        self.sums = {}
        means = {name: total / count for name, (total, count) in totals.items() if count}
        for name in totals:
            sides = [name.replace(DIFFERENCE, side) for side in ("chosen", "rejected")]
            if name.endswith(DIFFERENCE) and all(side in means for side in sides):
                means[name.replace(DIFFERENCE, "margins")] = means[sides[0]] - means[sides[1]]
        return {k: v for k, v in means.items() if not k.endswith(DIFFERENCE)}

    def _gathered(self) -> dict[str, list[float]]:
        mine = self.state()
        everyone: list[Any] = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, mine)
        totals: dict[str, list[float]] = {}
        for part in everyone:
            for name, (total, count) in part.items():
                entry = totals.setdefault(name, [0.0, 0.0])
                entry[0], entry[1] = entry[0] + total, entry[1] + count
        return totals


class Shares:
    """Parts of sums over one step: the loss and its terms, over denominators of the whole step."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor], real: bool) -> None:
        """Those of one batch; one that only keeps a process in step counts 0."""
        parts = {"loss": loss, **{k: v for k, v in metrics.items() if is_share(k)}}
        for name, value in parts.items():
            part = value.detach().double() if real else value.new_zeros((), dtype=torch.float64)
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def log(self, meter: Meter, world: int) -> None:
        """One step's entry of the meter's means over steps and processes."""
        for name, total in self.sums.items():
            meter.add(name, total * world)


def is_share(name: str) -> bool:
    """Whether a metric is a part of a sum over the step, as the loss is, and not a mean."""
    return name in ("nll_loss", "penalty") or name.startswith("loss/") or name.endswith("/loss")


class _Counts:
    """What the metrics of a batch are means over."""

    def __init__(self, metrics: Mapping[str, Tensor], examples: list[Example]) -> None:
        groups = float(len(examples))
        lengths = [[float(seq.length) for seq in example.sequences] for example in examples]
        tokens, sequences = sum(map(sum, lengths)), float(sum(map(len, lengths)))
        self.groups, self.unpaired = groups, False
        # side -> rows and tokens
        self.sides: dict[str, tuple[float, float]] = {"mean": (sequences, tokens)}
        self.scored = self.accuracy = tokens
        if examples[0].relevance is not None:  # lists: the best answer, and all the others
            self.sides |= {"chosen": (groups, 0.0), "rejected": (sequences - groups, 0.0)}
        elif "logps/mean" in metrics:  # neither pairs nor labels: means over all sequences
            return
        elif len(lengths[0]) == 1:  # single answers: a side counts its own rows
            self.unpaired = True
            for side, flag in (("chosen", True), ("rejected", False)):
                own = [n[0] for n, e in zip(lengths, examples, strict=True) if e.desirable is flag]
                self.sides[side] = (float(len(own)), sum(own))
            self.accuracy = self.sides["chosen"][1]
        else:
            for place, side in enumerate(("chosen", "rejected")):
                self.sides[side] = (groups, sum(n[place] for n in lengths))
            self.accuracy = self.sides["chosen"][1]
            self.scored = self.accuracy + self.sides["rejected"][1]

    def of(self, name: str) -> float:
        kind, _, side = name.rpartition("/")
        if name in ("entropy", "perf/active_share"):
            return self.scored
        if name == "mean_token_accuracy":
            return self.accuracy
        if side not in self.sides:
            return self.groups
        rows, tokens = self.sides[side]
        return tokens if kind == "logits" else rows


class History:
    """`log_history`: a list of rows, mirrored to log_history.jsonl and the trackers (rank 0)."""

    def __init__(self, path: Path | None, rows: list[dict[str, Any]], accelerator: Any) -> None:
        self.path, self.rows, self.accelerator = path, list(rows), accelerator
        if path is not None:  # rows beyond the checkpoint belong to a run that did not happen
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            with writing(path):
                path.write_text(lines, encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """One row; a number that is not finite becomes null, for JSON has none."""
        row = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self.rows.append(row)
        if self.path is not None:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.accelerator.trackers:
            step = row["step"]
            numbers = {k: v for k, v in row.items() if k != "step" and v is not None}
            self.accelerator.log(numbers, step=step)


def performance(device: torch.device, tokens: int, seconds: float) -> dict[str, float]:
    """Tokens per second of the window and peak memory of this process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    return {"perf/tokens_per_second": tokens / max(seconds, 1e-9), "perf/peak_memory_gib": peak}


def total_flos(model: nn.Module, tokens: int) -> float:
    """transformers' estimate: 6 per parameter and token, embeddings left out."""
    embeddings = sum(size(p) for n, p in model.named_parameters() if "embed" in n)
    return 6.0 * tokens * (sum(map(size, model.parameters())) - embeddings)


def postfix(row: dict[str, Any]) -> dict[str, str]:
    """What the progress bar shows."""
    keys = {
        "loss": "loss",
        "rewards/accuracies": "acc",
        "rewards/margins": "margin",
        "rank/ndcg": "ndcg",
    }
    return {short: f"{row[name]:.4g}" for name, short in keys.items() if name in row}


def trainer_state(
    config: TrainConfig,
    step: int,
    total_steps: int,
    tokens: int,
    rows: list[dict[str, Any]],
    flos: float,
) -> dict[str, Any]:
    """The keys that readers of transformers' trainer_state.json expect."""
    return {
        "best_global_step": None,
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": rows[-1].get("epoch", 0.0) if rows else 0.0,
        "eval_steps": config.eval_steps,
        "global_step": step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": rows,
        "logging_steps": config.logging_steps,
        "max_steps": total_steps,
        "num_input_tokens_seen": tokens,
        "num_train_epochs": math.ceil(config.num_train_epochs),
        "save_steps": config.save_steps,
        "stateful_callbacks": {},
        "total_flos": flos,
        "train_batch_size": config.per_device_train_batch_size,
        "trial_name": None,
        "trial_params": None,
    }
