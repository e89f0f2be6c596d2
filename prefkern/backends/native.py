"""What the compiled libraries share: the arithmetic of rows (csrc/numerics/finish.h), the
`Arithmetic` of the contract for the devices of a library, and the ops outside the head."""

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


class NativeOps:
    """The ops outside the head as a library has them; `ops` gives its namespace of torch.ops."""

    def __init__(self, ops: Callable[[], Any]) -> None:
        self.ops = ops

    def list_rank_fwd(
        self,
        scores: Tensor,  # [S]
        labels: Tensor,  # [S], NaN where masked
        cu_groups: Tensor,  # [G+1] int32
        topk: Tensor | None,  # [G] int64
        family: str,
        options: str,
    ) -> tuple[Tensor, Tensor]:
        """(loss [G], u [S])."""
        return self.ops().list_rank_fwd(scores, labels, cu_groups, topk, family, options)

    def segment_sum_fwd(
        self,
        values: Tensor,  # [m, N]
        weights: Tensor | None,  # [N] or [m, N]
        cu_seqlens: Tensor,  # [S+1] int32
    ) -> Tensor:
        """[m, S] float64."""
        return self.ops().segment_sum_fwd(values, weights, cu_seqlens)

    def segment_sum_bwd(
        self,
        d_out: Tensor,  # [m, S]
        values: Tensor,
        weights: Tensor | None,
        cu_seqlens: Tensor,
        need_values: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor]:
        """(d_values [m, N], d_weights like weights); [0] where not needed."""
        return self.ops().segment_sum_bwd(
            d_out, values, weights, cu_seqlens, need_values, need_weights
        )

    def error_sum_fwd(
        self,
        pred: Tensor,  # [B, O, F, I]
        target: Tensor,
        ref: Tensor | None,
        segments: Tensor | None,  # [F] int32
        num_segments: int,
        stats: str,
    ) -> Tensor:
        """[n, B, num_segments] float64."""
        return self.ops().error_sum_fwd(pred, target, ref, segments, num_segments, stats)

    def error_sum_bwd(
        self,
        d_out: Tensor,  # [n, B, num_segments]
        pred: Tensor,
        target: Tensor,
        ref: Tensor | None,
        segments: Tensor | None,
        stats: str,
    ) -> Tensor:
        """d_pred like pred."""
        return self.ops().error_sum_bwd(d_out, pred, target, ref, segments, stats)


def _teacher_mass(call: HeadCall) -> Tensor | None:
    """[N] float64: sum_k q_k of xent's teacher."""
    if not call.plan.has("xent"):
        return None
    assert call.values is not None
    return call.values.double().sum(1)


def _threshold(folded: Folded) -> Tensor | None:
    """[2, M]: the last member of bkl's top set."""
    return None if folded.top is None else folded.top[:, -1].contiguous()
