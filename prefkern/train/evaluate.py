"""Held-out metrics, and what training and evaluation share about a batch."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from .data import Example, collate, length_baseline
from .inputs import step_arguments
from .logs import Meter
from .reference import Reference, baseline_from
from .run import Run


@torch.no_grad()
def evaluate(run: Run, examples: list[Example], reference: Reference) -> dict[str, float]:
    """Metrics over `examples` under eval_ names, with the length-only baseline beside them."""
    step, size = run.step, run.config.per_device_eval_batch_size
    chunks = [list(range(i, min(i + size, len(examples)))) for i in range(0, len(examples), size)]
    meter, training, started = Meter(), step.training, time.perf_counter()
    step.eval()
    for indices, real in deal(chunks, run.rank, run.world):
        chosen = [examples[i] for i in indices]
        batch = collate(chosen, **run.collate_options).to(run.device)
        rows = reference.rows(batch, indices)
        if run.needs.kl_baseline:
            rows.loss_args["kl_baseline"] = kl_baseline(run, reference, chosen, real)
        rows.loss_args |= step_arguments(run.records, run.config.loss_args, chosen)
        items = run.count_items(chosen)
        loss, metrics = step(batch, rows, items)
        if real:
            meter.add("loss", loss, float(len(chosen)))
            meter.add_all(metrics, chosen)
    step.train(training)
    found = {f"eval_{name}": value for name, value in meter.pop().items()}
    seconds = time.perf_counter() - started
    if run.layout != "unpaired":
        found["eval_length_baseline"] = length_baseline(examples)
    return found | {
        "eval_runtime": seconds,
        "eval_samples_per_second": len(examples) / seconds,
    }


def deal(chunk: list[list[int]], rank: int, world: int) -> Iterator[tuple[list[int], bool]]:
    """This rank's batches of `chunk`; (its first batch, False) where the rank has one too few."""
    for start in range(0, len(chunk), world):
        has = start + rank < len(chunk)
        yield (chunk[start + rank], True) if has else (chunk[0], False)


def kl_baseline(
    run: Run, reference: Reference, examples: list[Example], real: bool
) -> Tensor:  # []
    """kto's baseline over the mismatched completions of this micro-batch on all ranks."""
    rows = reference.mismatched_logratio(
        examples, packed=run.packed, pad_id=run.pad_id, device=run.device
    )
    total = torch.stack((rows.sum(), rows.new_tensor(float(rows.numel())))) * float(real)
    if run.world > 1:
        torch.distributed.all_reduce(total)
    return baseline_from(total[0] / total[1])
