"""Log-probabilities of answers to prompts, tokenised as training does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from ...integrations import hf
from ...integrations.head import at_head
from .. import models, reference_cache
from ..config import TrainConfig
from ..data import Loader, PreferenceBatch
from ..data.rows import Text
from ..reference import token_logps

Prompt = Mapping[str, Any]  # a row of the prompts' table


def answer_logps(
    model: hf.Model,
    tokenizer: Any,
    rows: Sequence[Prompt],
    answers: Sequence[Text],
    config: TrainConfig,
    *,
    off: Callable[[], AbstractContextManager] = nullcontext,
    read: Callable[[Any, PreferenceBatch, TrainConfig], Tensor] = token_logps,
    told: Counter[str] | None = None,
) -> list[Tensor | None]:  # of [t]
    """Log-probabilities of every token of one answer per row, tokenised as training does it; None
    where the row cannot be used. `off` is the context of the forwards (an adapter switched off);
    `read` may give other numbers [B, T] of a batch under the model; `told` counts the reasons."""
    table = [
        training_row(row) | {"completion": as_completion(row, text)}
        for row, text in zip(rows, answers, strict=True)
    ]
    loader = Loader(
        tokenizer=tokenizer, layout="unpaired", labelled=False, max_length=config.max_length,
        model_context=models.context_length(model), vocab_size=hf.text_config(model).vocab_size,
        append_eos=config.append_eos, may_be_empty=True,
    )  # fmt: skip
    examples, _, report = loader.load(table)
    if told is not None:
        told.update(report.counts)
    found: list[Tensor | None] = [None] * len(table)
    if not examples:
        return found
    at_head(model)
    training = model.training
    model.eval()
    with off():
        logp, ends = reference_cache.compute(
            model, examples, config, packed=False, pad_id=0, read=read
        )
    model.train(training)
    for example, a, b in zip(examples, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        found[example.row] = logp[a:b]
    return found


def as_completion(row: Prompt, text: Text) -> Any:
    """An answer in the form of the prompt: text, or one assistant message; messages as they are."""
    if isinstance(row["prompt"], str) or not isinstance(text, str):
        return text
    return [{"role": "assistant", "content": text}]


def training_row(row: Prompt) -> dict[str, Any]:
    """What of a prompt's row goes on to training: the prompt and what its template needs."""
    kept = ("prompt", "tools", "chat_template_kwargs")
    return {name: row[name] for name in kept if row.get(name) is not None}
