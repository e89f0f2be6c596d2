"""The arithmetic of rows in a compiled library (csrc/numerics/finish.h): the `Arithmetic` of the
contract for the devices of that library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contract import Folded, HeadCall


class NativeArithmetic:
    """merge, norms, finish and pull as ops of a library: `ops` gives its namespace of torch.ops."""

    def __init__(self, ops: Callable[[], Any]) -> None:
        self.ops = ops

    def merge(self, call: HeadCall, fields: Tensor, starts: Tensor, rounded: bool) -> Tensor:
        return self.ops().merge(fields, starts, call.plan.text, rounded)

    def norms(self, call: HeadCall, folded: Folded) -> Tensor:
        return self.ops().norms(folded.sums, _threshold(folded), call.fold_dtype == torch.float64)

    def finish(
        self, call: HeadCall, folded: Folded, second: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.ops().finish(
            folded.sums, folded.at, second, _threshold(folded), call.targets, call.rows,
            _teacher_mass(call),
            call.ignore_index, call.total, call.plan.text, folded.rounded,
            call.fold_dtype == torch.float64,
        )  # fmt: skip

    def pull(self, call: HeadCall, d_out: Tensor, out: Tensor, saved: Tensor) -> Tensor:
        slope = call.policy.scale / call.policy.temperature
        return self.ops().pull(
            d_out, out, saved, call.targets, call.rows, call.ignore_index, slope,
            call.plan.text,
        )  # fmt: skip


def _teacher_mass(call: HeadCall) -> Tensor | None:
    """[N] float64: sum_k q_k of xent's teacher."""
    if not call.plan.has("xent"):
        return None
    assert call.values is not None
    return call.values.double().sum(1)


def _threshold(folded: Folded) -> Tensor | None:
    """[2, M]: the last member of bkl's top set."""
    return None if folded.top is None else folded.top[:, -1].contiguous()
