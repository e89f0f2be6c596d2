"""The token view of one row of a run's data, under the run's models and providers."""

from __future__ import annotations

import torch

from ..integrations.token_view import TokenView, answers, statistics
from ..objective.token_weights import stage_weights
from .data import Example
from .forward import inputs_of
from .models import autocast
from .run import Run


@torch.no_grad()
def view_example(run: Run, example: Example, *, title: str | None = None) -> TokenView:
    """What the run's first loss sees of one group of answers.

    Args:
        run: Of `prepare`, in training or not; learned masks are those of the model's folder.
        example: One of its examples.
        title: Default the name of the loss and the row.
    """
    step, name = run.step, run.config.loss[0]
    training = step.training
    step.eval()
    for provider in run.providers:
        provider.begin_step([example], None)
    micro = run.micro_batch([example])
    batch = micro.batch
    rows, given = run.constants(micro)
    reference = rows.logp if rows.states is None else rows.states
    given |= {k: v for p in run.providers for k, v in p.learned(batch).items()}
    with autocast(run.config, run.device.type), inputs_of(step.policy, batch) as inputs:
        tokens = step.policy(**inputs, at_head=statistics(batch.targets, reference)).value
    weights = stage_weights(
        tokens, batch.targets, batch.cu_seqlens, loss=list(run.config.loss), layout=run.layout,
        token_weights=batch.token_weights, **{**step.loss_args, **given},
    )  # fmt: skip
    step.train(training)
    first = example.sequences[0]
    prompt = run.tokenizer.decode(
        first.input_ids[: first.completion_start].tolist(), skip_special_tokens=True
    )
    bounds = None if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    found = answers(tokens, batch.targets, weights, run.tokenizer, _names(run, example), bounds)
    return TokenView(title or f"{name}, row {example.row}", prompt, found)


def _names(run: Run, example: Example) -> list[str]:
    if example.relevance is not None:
        return [f"answer of relevance {value:g}" for value in example.relevance]
    if len(example.sequences) == 1:
        kinds = {True: "answer, desirable", False: "answer, undesirable", None: "answer"}
        return [kinds[example.desirable]]
    rows = run.records[0].rows
    return list(rows) if len(rows) == len(example.sequences) else ["chosen", "rejected", "third"]
