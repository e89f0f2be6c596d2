"""Eager twin of logits_logps: the formulas on logits that already exist."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import SAVED_ROWS
from . import formulas
from .linear_logps import sum_gradients
from .rows import Scored, fold_dtype, scored_rows


def logits_logps_fwd(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    ref_logits: Tensor | None,  # [N, V]
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    """(out [n, N], saved [10, N] = lse, ref_lse, ...)."""
    n = logits.shape[0]
    scored = scored_rows(targets, ignore_index, None)
    s = _inputs(scored, logits, targets, ref_logits, temperature)
    out = torch.stack([formulas.value(stat, s) for stat in stats])
    saved = out.new_zeros((SAVED_ROWS, s.y.shape[0]))
    saved[0] = s.policy.lse
    if s.ref is not None:
        saved[1] = s.ref.lse
    return scored.put(out, n, dim=1), scored.put(saved, n, dim=1)


def logits_logps_bwd(
    d_out: Tensor,  # [n, N]
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    out: Tensor,  # [n, N]
    saved: Tensor,  # [10, N]
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> Tensor:
    """d_logits [N, V] in logits' dtype."""
    scored = scored_rows(targets, ignore_index, None)
    s = _inputs(scored, logits, targets, ref_logits, temperature)
    dz = sum_gradients(d_out, scored, stats, s) / temperature
    return scored.put(dz, logits.shape[0]).to(logits.dtype)


def _inputs(
    scored: Scored, logits: Tensor, targets: Tensor, ref_logits: Tensor | None, temperature: float
) -> formulas.Inputs:
    acc = fold_dtype(logits.dtype)
    policy = formulas.model(scored.take(logits).to(acc) / temperature)
    ref = None
    if ref_logits is not None:
        ref = formulas.model(scored.take(ref_logits).to(acc) / temperature)
    return formulas.Inputs(scored.take(targets).clamp(min=0), policy, ref)
