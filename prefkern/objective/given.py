"""What preference_loss and loss_from_stats are given beside models and losses, checked before work.

Shapes: N tokens, S sequences, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks

# Denominators: the items of some loss, or the tokens of a likelihood term.
ITEMS = ("pairs", "groups", "sequences", "tokens", "scored_tokens")
LAYOUTS = ("pairs", "halves", "lists", "unpaired")  # the last two form no pairs


def check_num_items(num_items: Mapping[str, Any] | None) -> dict[str, Any]:
    """The caller's denominators; a name that no loss has would be left out in silence.

    Raises:
        ValueError: something other than a dict, an unknown name, a value that cannot divide.
    """
    if num_items is None:
        return {}
    if not isinstance(num_items, Mapping) or not set(num_items) <= set(ITEMS):
        raise ValueError(
            f"num_items must be a dict with names among {ITEMS}, got "
            f"{list(num_items) if isinstance(num_items, Mapping) else repr(num_items)}; such as "
            'num_items={"pairs": 64}.'
        )
    for name, count in num_items.items():
        if not _divides(count):
            raise ValueError(
                f"num_items[{name!r}] must be a number > 0 or a tensor of one, got "
                f"{_told(count) if isinstance(count, Tensor) else repr(count)}."
            )
    return dict(num_items)


def _divides(count: Any) -> bool:
    if not isinstance(count, Tensor):
        number = isinstance(count, (int, float, torch.SymInt)) and not isinstance(count, bool)
        return number and 0 < count < math.inf
    if count.numel() != 1 or count.dtype == torch.bool or count.is_complex():
        return False
    return not checks.readable(count) or 0 < count.item() < math.inf


def _told(tensor: Tensor) -> str:
    if tensor.numel() == 1 and checks.readable(tensor):
        return f"a tensor of {tensor.item()}"
    return f"{tensor.dtype} {checks.shape_text(tensor)}"


def factors_of(loss_weights: Sequence[float] | Tensor | None, losses: int) -> list[float]:
    """One factor per loss.

    Raises:
        ValueError: something other than numbers, as many as losses and finite.
    """
    if loss_weights is None:
        return [1.0] * losses
    listed = isinstance(loss_weights, (list, tuple)) or (
        isinstance(loss_weights, Tensor) and loss_weights.dim() == 1
    )
    if not listed:
        raise ValueError(
            f"loss_weights must be a list of numbers, one per loss ({losses}), got "
            f"{loss_weights!r:.60}."
        )
    for i, weight in enumerate(loss_weights):
        checks.check_number(f"loss_weights[{i}]", weight)
    factors = [float(w) for w in loss_weights]
    if len(factors) != losses:
        raise ValueError(f"loss_weights must have one number per loss ({losses}), got {factors}.")
    if not all(map(math.isfinite, factors)):
        raise ValueError(f"loss_weights must be finite numbers, got {factors}.")
    return factors


def check_options(layout: object, metrics: object, state_arguments: object) -> None:
    """Refuses an unknown layout, a flag that is none and a state that cannot be asked."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(
            f"layout must be one of {LAYOUTS}: pairs are chosen, rejected, chosen, ...; halves all "
            f"chosen, then all rejected; got {layout!r}."
        )
    checks.check_flag("metrics", metrics)
    if state_arguments is not None and not callable(state_arguments):
        raise ValueError(
            f"state_arguments must be a function or None, got {state_arguments!r:.60}; it is "
            "called with a loss's record, its rows and its hyper-parameters."
        )


def check_labels(
    cu_groups: Tensor | None,  # [G+1]
    relevance: Tensor | None,  # [S]
    desirable: Tensor | None,  # [S]
    sequences: int,
) -> None:
    """Refuses labels of another kind or shape, whether a loss of the call reads them or not."""
    for name, value in (("relevance", relevance), ("desirable", desirable)):
        if value is None:
            continue
        checks.check_tensor(name, value)
        if tuple(value.shape) != (sequences,):
            raise ValueError(
                f"{name} must be [S] = [{sequences}], one per sequence, got "
                f"{checks.shape_text(value)}."
            )
    if relevance is not None and (relevance.dtype == torch.bool or relevance.is_complex()):
        raise ValueError(
            f"relevance must be numbers, higher is better, got {relevance.dtype}; give each answer "
            "its rank or reward."
        )
    if desirable is not None and desirable.dtype != torch.bool:
        raise ValueError(
            f"desirable must be bool, got {desirable.dtype}; a number or NaN is no label: write "
            "the condition out, e.g. desirable=scores > 0."
        )
    if cu_groups is not None:
        checks.check_cu_seqlens(cu_groups, sequences, name="cu_groups", of="sequences")


def checked_weights(
    token_weights: Tensor | Mapping[str, Tensor] | None,
    shape: torch.Size,
    read: frozenset[str],
) -> Tensor | dict[str, Tensor] | None:
    """The caller's token weights: float tensors in the shape of targets, of statistics that the
    losses read (`read`); a misspelt name would be left out in silence."""
    if token_weights is None:
        return None
    if not isinstance(token_weights, Mapping):
        return _weight("token_weights", token_weights, shape)
    known = tuple(sorted(read - {"ref_logp"}))
    if unknown := [name for name in token_weights if name not in known]:
        hint = "'logp' weighs ref_logp too" if "ref_logp" in unknown else "drop them"
        raise ValueError(
            f"token_weights may weigh what the losses read, {known}, got {unknown}; {hint}."
        )
    return {
        name: _weight(f"token_weights[{name!r}]", weight, shape)
        for name, weight in token_weights.items()
    }


def _weight(name: str, weight: object, shape: torch.Size) -> Tensor:
    tensor = checks.check_float(name, weight)
    if tensor.shape not in (shape, (shape.numel(),)):
        raise ValueError(
            f"{name} must have the shape of targets {list(shape)}, got {checks.shape_text(tensor)}."
        )
    return tensor
