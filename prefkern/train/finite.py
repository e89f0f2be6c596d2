"""What a run says when a loss, a gradient or a weight is no number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .data import Example
from .processes import Processes
from .seals import last_whole
from .sharded import local, reshard

_SHOWN = 8
_SAMPLED = 8192  # of a matrix, to see whether it moved
OF_LABELS = "labels that are no small grades want --list-labels order"


def is_finite(found: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, found.values()))


def message_of(
    found: Mapping[str, float], step: int, examples: Sequence[Example], lists: bool, left: str
) -> str:
    """Which number of a step it was, of which rows, what to do and what is left.

    Args:
        found: "loss" and "grad_norm" of the step.
        step: Its number, from 1.
        examples: Those of the step.
        lists: Whether they are ranked lists.
        left: What can be continued from.
    """
    loss, norm = found["loss"], found["grad_norm"]
    what = f"gradient norm became {norm:g} (loss {loss:g})"
    if not math.isfinite(loss):
        what = f"loss became {loss:g} (gradient norm {norm:g})"
    rows = ", ".join(str(example.row) for example in examples[:_SHOWN])
    rows += " ..." if len(examples) > _SHOWN else ""
    advice = "lower the learning rate, or look at these rows"
    if step == 1:
        advice = "no weight has moved yet, so look at these rows, at the loss's arguments and at "
        advice += "the model's weights"
    if lists:
        advice += f"; {OF_LABELS}"
    return f"the {what} at step {step}, rows {rows}: {advice}; {left}."


def check_weights(module: nn.Module, step: int, folder: Path, processes: Processes) -> None:
    """Refuses trained weights that are no numbers; every process must call it.

    Raises:
        ValueError: in every process, naming the first of them, the step and what can be continued
            from.
    """
    reshard(module)
    trained = ((name, local(p)) for name, p in module.named_parameters() if p.requires_grad)
    found = next((name for name, own in trained if not bool(own.isfinite().all())), "")
    for name in processes.everyone(found):
        if name:
            raise ValueError(
                f"{name} is not finite after step {step} and is not written: lower the learning "
                f"rate; {last_whole(folder)}."
            )


def sampled(module: nn.Module) -> list[Tensor]:
    """At most _SAMPLED numbers of every trained matrix, of what this process holds of it."""
    reshard(module)
    flat = [local(p).detach().reshape(-1) for p in module.parameters() if p.requires_grad]
    return [values[:: max(1, len(values) // _SAMPLED)].clone() for values in flat]


def check_moved(
    module: nn.Module, before: Sequence[Tensor], config: TrainConfig, processes: Processes
) -> None:
    """Refuses a run that left the weights as they were; every process must call it.

    Args:
        before: What `sampled` gave before the first step.

    Raises:
        ValueError: in every process, with what to do.
    """
    moved = any(not torch.equal(a, b) for a, b in zip(before, sampled(module), strict=True))
    if not any(processes.everyone(moved)):
        raise ValueError(
            "no weight changed, so nothing was trained and nothing is written: updates at "
            f"learning_rate {config.learning_rate:g} and max_grad_norm {config.max_grad_norm:g} "
            f"are lost in the rounding of {config.dtype} weights; raise them."
        )
