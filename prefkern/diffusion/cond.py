"""Conditions: whatever a denoiser takes beside noisy samples and times, one entry per sample.

A tensor `[B, ...]`, a list of B items (captions), or a dict or tuple of those. A user's vector is
one more entry of a dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check(cond: Any, count: int, name: str = "cond") -> None:
    """Refuses a condition that has not one entry per sample.

    Raises:
        ValueError: another number of entries, an item of a list that is None.
    """
    if cond is None:
        return
    if isinstance(cond, dict):
        for key, value in cond.items():
            check(value, count, f"{name}[{key!r}]")
    elif isinstance(cond, tuple):
        for i, value in enumerate(cond):
            check(value, count, f"{name}[{i}]")
    elif isinstance(cond, (Tensor, list)):
        if (isinstance(cond, Tensor) and not cond.dim()) or len(cond) != count:
            got = list(cond.shape) if isinstance(cond, Tensor) else f"a list of {len(cond)}"
            raise ValueError(f"{name} must have one entry per sample, {count}, got {got}.")
        if isinstance(cond, list) and (missing := [i for i, x in enumerate(cond) if x is None]):
            raise ValueError(
                f'{name} misses entries {missing}; every sample needs its caption ("" for none).'
            )
    else:
        raise ValueError(
            f"{name} must be a tensor [B, ...], a list of B items, or a dict or tuple of those, "
            f"got {type(cond).__name__}."
        )


def joined(first: Any, second: Any) -> Any:
    """The entries of two conditions of one make, one after the other.

    Raises:
        ValueError: conditions of different make.
    """
    if first is None and second is None:
        return None
    alike = type(first) is type(second) and (
        not isinstance(first, (dict, tuple)) or len(first) == len(second)
    )
    if not alike or (isinstance(first, dict) and first.keys() != second.keys()):
        raise ValueError(
            f"the conditions of both sides must be of one make, got {_make(first)} and "
            f"{_make(second)}."
        )
    if isinstance(first, dict):
        return {key: joined(value, second[key]) for key, value in first.items()}
    if isinstance(first, tuple):
        return _tuple(first, [joined(a, b) for a, b in zip(first, second, strict=True)])
    if isinstance(first, list):
        return first + second
    return torch.cat([first, second])


def taken(cond: Any, index: Tensor) -> Any:
    """The entries at `index` [n], integers."""
    return _mapped(cond, lambda x: [x[i] for i in index.tolist()], lambda x: x[index])


def repeated(cond: Any, times: int) -> Any:
    """Every entry `times` times in a row."""
    return _mapped(
        cond, lambda x: [item for item in x for _ in range(times)],
        lambda x: x.repeat_interleave(times, 0),
    )  # fmt: skip


def dropped(cond: Tensor, share: float, *, generator: torch.Generator | None = None) -> Tensor:
    """`[B, ...]` with each entry set to 0 with probability `share`: users or captions left out in
    training, so that guidance has something to start from.

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be in [0, 1], got {share}.")
    kept = torch.rand(len(cond), generator=generator, device=cond.device) >= share
    return torch.where(kept.reshape(-1, *[1] * (cond.dim() - 1)), cond, 0.0)


def _mapped(cond: Any, of_list: Callable[[Any], Any], of_tensor: Callable[[Any], Any]) -> Any:
    if cond is None:
        return None
    if isinstance(cond, dict):
        return {key: _mapped(value, of_list, of_tensor) for key, value in cond.items()}
    if isinstance(cond, tuple):
        return _tuple(cond, [_mapped(value, of_list, of_tensor) for value in cond])
    return of_list(cond) if isinstance(cond, list) else of_tensor(cond)


def _tuple(like: tuple[Any, ...], values: list[Any]) -> tuple[Any, ...]:
    return type(like)(*values) if hasattr(like, "_fields") else tuple(values)


def _make(cond: Any) -> str:
    if isinstance(cond, dict):
        return f"a dict of {sorted(cond)}"
    return f"a tuple of {len(cond)}" if isinstance(cond, tuple) else type(cond).__name__
