"""Calls of logits that exist, as the kernels of a tile see them (prefkern.backends.tiled)."""

from __future__ import annotations

from torch import Tensor

from prefkern.backends.contract import HeadCall, Model
from prefkern.backends.plan import NO_PLAN, read_plan, write_plan
from prefkern.backends.tiled.epilogue import Sweep
from prefkern.backends.tiled.operands import gather
from prefkern.stats import ONE_MODEL_STATS, TWO_MODEL_STATS, parse_stats


def call_of(stats, targets: Tensor, policy: Model, ref: Model | None = None) -> HeadCall:
    call = HeadCall(policy, ref, None, targets, None, None, None, -100, NO_PLAN)
    parsed = parse_stats(stats, allowed=ONE_MODEL_STATS + TWO_MODEL_STATS)
    text = write_plan(parsed, frozenset(), call.present(), short=False)
    return call._replace(plan=read_plan(text))


def sweep_of(stats, targets: Tensor, policy: Model, ref: Model | None = None) -> Sweep:
    return gather(call_of(stats, targets, policy, ref)).sweep
