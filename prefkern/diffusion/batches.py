"""Batches of preferences over samples, in the forms that losses read.

Shapes: P pairs, S samples, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..ops import ragged
from . import cond as conditions
from .noised import Noised

# Samples [B, ...] that the source will make noisy, or samples that are noisy already.
Side = Tensor | Noised


@dataclass(frozen=True)
class Pairs:
    """Two samples per pair, each clean (a tensor) or noisy already (`Noised`).

    Both sides get the same level and noise; where one is noisy already, its level.

    Args:
        chosen, rejected: `[P, ...]` samples, or Noised.
        cond: Conditions of the pairs. Default None.
        rejected_cond: Conditions of the rejected sides where they differ (their own captions).
            Default None, `cond`.
        inputs: Tensors that the loss reads by name: p_win, labels, h.
    """

    chosen: Side
    rejected: Side
    cond: Any = None
    rejected_cond: Any = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def parts(self) -> tuple[tuple[Side, Any, str], ...]:
        other = self.cond if self.rejected_cond is None else self.rejected_cond
        return (self.chosen, self.cond, "chosen"), (self.rejected, other, "rejected")

    def owners(self) -> Tensor:  # [P]
        return torch.arange(_count(self.chosen), device=_tensor(self.chosen).device)

    def check(self) -> None:
        """Refuses sides that are not pairs.

        Raises:
            ValueError: sides of different shape, a caption of the rejected side alone, conditions
                or inputs that have not one entry per pair.
        """
        one, two = _tensor(self.chosen), _tensor(self.rejected)
        if one.shape != two.shape:
            raise ValueError(
                f"chosen and rejected must have one shape [P, ...], got {checks.shape_text(one)} "
                f"and {checks.shape_text(two)}."
            )
        if self.cond is None and self.rejected_cond is not None:
            raise ValueError(
                "the rejected sides have conditions and the chosen ones none; pass cond too."
            )
        _check(self, len(one))
        conditions.check(self.rejected_cond, len(one), "rejected_cond")


@dataclass(frozen=True)
class Ranked:
    """Groups of samples of one prompt each; a group shares level and noise.

    Args:
        samples: `[S, ...]` samples, or Noised.
        cu_groups: `[G+1]` boundaries of the groups.
        cond: Conditions of the samples `[S]`. Default None.
        inputs: Tensors that the loss reads by name: phi or relevance `[S]`.
    """

    samples: Side
    cu_groups: Tensor
    cond: Any = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def parts(self) -> tuple[tuple[Side, Any, str], ...]:
        return ((self.samples, self.cond, "samples"),)

    def owners(self) -> Tensor:  # [S]
        return ragged.owner(self.cu_groups, _count(self.samples))

    def check(self) -> None:
        """As `Pairs.check`."""
        count = _count(self.samples)
        checks.check_cu_seqlens(self.cu_groups, count, name="cu_groups", of="samples")
        _check(self, count)


@dataclass(frozen=True)
class Single:
    """Samples without a comparison, for regressions.

    Args:
        samples: `[S, ...]` samples, or Noised.
        cond: Conditions of the samples. Default None.
        inputs: Tensors that the loss reads by name: weight.
    """

    samples: Side
    cond: Any = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def parts(self) -> tuple[tuple[Side, Any, str], ...]:
        return ((self.samples, self.cond, "samples"),)

    def owners(self) -> Tensor:  # [S]
        return torch.arange(_count(self.samples), device=_tensor(self.samples).device)

    def check(self) -> None:
        """As `Pairs.check`."""
        _check(self, _count(self.samples))


Batch = Pairs | Ranked | Single


def _tensor(side: Side) -> Tensor:
    return side.x if isinstance(side, Noised) else side


def _count(side: Side) -> int:
    return len(_tensor(side))


def _check(batch: Batch, count: int) -> None:
    for side, _, name in batch.parts():
        if isinstance(side, Noised):
            side.check(name)
        checks.check_float(name, _tensor(side))
        if _tensor(side).dim() < 2 or not count:
            raise ValueError(
                f"{name} must be [B, ...] with at least one sample and one axis of elements, got "
                f"{checks.shape_text(_tensor(side))}."
            )
    conditions.check(batch.cond, count)
    for name, value in batch.inputs.items():
        if not isinstance(value, Tensor) or not value.dim() or len(value) != count:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"inputs[{name!r}] must be a tensor [{count}, ...], got {got}.")
