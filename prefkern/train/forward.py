"""How every model of a run is called: a batch's inputs, and log-probabilities at the head.

Shapes: [B, T] as the batch has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ..integrations import hf, packed_attention
from ..integrations.loss_at_head import read_other
from .data import PreferenceBatch


@contextmanager
def inputs_of(model: hf.Model, batch: PreferenceBatch) -> Iterator[dict[str, Any]]:
    """The arguments of `model`'s forward for a batch; the forward runs inside the context."""
    given: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    positions = batch.position_ids
    inner = hf.causal_lm(model)
    # models that read more than text count positions themselves, some along three axes
    own = hf.text_config(model) is not inner.config
    if positions is not None and not own and hf.takes_position_ids(model):
        given["position_ids"] = positions
    given |= batch.inputs
    with packed_attention.arguments(inner, positions, batch.attention_mask) as extra:
        yield given | extra


@torch.no_grad()
def target_logps(
    model: hf.Model, batch: PreferenceBatch, *, backend: str = "auto"
) -> Tensor:  # [B, T], 0 where nothing is scored
    """Log-probabilities of a batch's targets under a model that was given `at_head`."""
    with inputs_of(model, batch) as inputs:
        found = read_other(model, inputs, batch.targets, distribution=False, backend=backend)
    return cast(Tensor, found)
