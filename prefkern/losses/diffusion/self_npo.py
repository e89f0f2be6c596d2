"""Self-NPO: a negative model from the policy's own truncated samples, by regression."""

from __future__ import annotations

from torch import Tensor

from ... import checks
from .. import core
from ..declare import diffusion
from . import errors


@diffusion(source="arXiv 2505.11777", status="code read")
def self_npo(
    err: Tensor,  # [B]
    *,
    weight: float | Tensor = 1.0,  # [B]
) -> Tensor:  # [B]
    """Self-NPO: regression of the predicted clean image onto a truncated sampling result.

    l = w e,  e = mean (p - t)^2 or the pseudo-Huber mean sqrt((p - t)^2 + c^2) - c

    arXiv 2505.11777, as in the authors' code. No pairs and no reference: p is
    the predicted clean image, t the result of truncated sampling, and e comes from
    error_sum(p, t).err or error_sum(p, t, stats=("huber:0.001",)).huber (c = 0.001 in the code).

    Args:
        err: `[B]` reduced error of each sample.
        weight: Weight of a sample, >= 0; a number or `[B]`.

    Returns:
        Unreduced loss `[B]`.
    """
    checks.check_float("err", err)
    errors.one_per_sample("err", err)
    core.not_negative("weight", weight)
    return core.per_item("weight", weight, err) * err
