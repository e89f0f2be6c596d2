"""Held-out metrics."""

from __future__ import annotations

import math
import time

import torch

from .data import Example, length_baseline
from .deal import deal
from .finite import OF_LABELS
from .logs import Meter, Shares
from .run import Run


@torch.no_grad()
def evaluate(run: Run, examples: list[Example]) -> dict[str, float]:
    """Metrics over `examples` under eval_ names, with the length-only baseline beside them.

    All the batches are one step: the loss and its terms are over the denominators of all examples.

    Raises:
        ValueError: a metric is not finite.
    """
    step, size = run.step, run.config.per_device_eval_batch_size
    chunks = [list(range(i, min(i + size, len(examples)))) for i in range(0, len(examples), size)]
    meter, shares = Meter(), Shares()
    training, started = step.training, time.perf_counter()
    step.eval()
    num_items = run.count_items(examples)
    for provider in run.providers:
        provider.begin_step(examples, None)
    for indices, real in deal(chunks, run.rank, run.world):
        chosen = [examples[i] for i in indices]
        micro = run.micro_batch(chosen, real=real)
        reference, given = run.constants(micro)
        loss, metrics = run.root(step, micro, reference, given, num_items)
        shares.add(loss, metrics, real)
        if real:
            meter.add_means(metrics, chosen)
    shares.log(meter, run.world)
    step.train(training)
    found = {f"eval_{name}": value for name, value in meter.pop().items()}
    if bad := [f"{name} {value}" for name, value in found.items() if not math.isfinite(value)]:
        labels = f"; {OF_LABELS}" if run.layout == "lists" else ""
        raise ValueError(
            f"evaluation gives no numbers ({', '.join(bad[:4])}): the model's weights, the rows or "
            f"the loss's arguments are at fault{labels}."
        )
    seconds = time.perf_counter() - started
    if run.layout != "unpaired":
        found["eval_length_baseline"] = length_baseline(examples)
    return found | {
        "eval_runtime": seconds,
        "eval_samples_per_second": len(examples) / seconds,
    }
