"""Batches of tiny models, what their own logits give, and the same at the head.

Shapes: B rows of T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from families import VOCAB
from torch import Tensor

import prefkern
from prefkern.integrations.head_view import shifted


def batch(rows: int = 3, length: int = 11, *, left: bool = False) -> tuple[dict, Tensor]:
    """(input_ids and attention_mask, targets), each [B, T], padded on one side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row, short in enumerate((0, 3, 6)[:rows]):
        mask[row, length - short :] = 0
        labels[row, length - short :] = -100
        labels[row, :2] = -100
    targets = shifted(labels)
    if not left:
        return {"input_ids": ids, "attention_mask": mask}, targets
    ids, mask = ids.flip(1), mask.flip(1)
    targets = shifted(ids).masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, targets


def own_logps(logits: Tensor, targets: Tensor) -> Tensor:  # [B, T]
    logps = logits.float().log_softmax(-1)
    own = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets != -100, own, 0.0)


def fused_logps(targets: Tensor) -> Callable[[Any], Tensor]:
    """For at_head=."""
    return lambda view: prefkern.linear_logps(view.hidden, view.head, targets).logp


def gradients(model: torch.nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of an uneven sum of log-probabilities, by parameter."""
    model.zero_grad()
    (logps * torch.linspace(0.5, 1.5, logps.numel()).view_as(logps)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    assert got.keys() == want.keys() and want
    scale = max(w.abs().max() for w in want.values())
    for name, value in want.items():
        difference = (got[name] - value).abs().max() / scale
        assert difference < bound, f"{name}: {difference:.2e}"  # NaN fails as well


def compare(model: Any, *, bound: float = 1e-4, seed: int = 7, **arguments: Any) -> None:
    """The model's own logits and the head give the same log-probabilities and gradients, the same
    random numbers drawn."""
    inputs, targets = batch()
    inputs |= arguments
    torch.manual_seed(seed)
    logits = model(**inputs, use_cache=False).logits
    own = own_logps(logits, targets)
    want = gradients(model, own)
    torch.manual_seed(seed)
    got = model(**inputs, at_head=fused_logps(targets)).value
    largest = logits.detach().nan_to_num(neginf=0.0).abs().max()
    assert (got - own).abs().max() < 1e-5 + 4e-6 * largest
    assert_same_gradients(gradients(model, got), want, bound)
