"""The record of a variant and how per-token numbers become the loss of a case.

A variant turns (case, inputs) into a scalar whose backward fills hidden.grad and weight.grad.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.ops import budget as table

from .cases import ALPHA, BETA, IGNORE, Case, Inputs

Step = Callable[[Inputs], Tensor]  # -> loss []
# (hidden [N, D], weight [V, D], targets [N]) -> log-probabilities [N], 0 where ignored
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """One implementation.

    build(case) imports what it needs (ImportError: the peer is missing, an empty row) and returns
    the step. `recompute(case)` is the number of forward products its backward repeats.
    """

    name: str
    steps: tuple[str, ...]
    build: Callable[[Case], Step]
    package: str = "torch"  # distribution whose version stands in the row
    compiled: bool = False  # memory is counted from after the first call, which compiles
    recompute: Callable[[Case], float] | None = None  # None: not stated
    kept_bytes: Callable[[Case], float] = lambda case: 0.0  # logits kept under a memory budget
    refuses: Callable[[Case], str | None] = lambda case: None  # reason not to run a case

    def products(self, case: Case) -> float | None:
        """Head-sized products of one step, by the variant's scheme."""
        if self.recompute is None:
            return None
        return sum(case.products.values()) + self.recompute(case)


def dpo_step(log_probs: LogProbs) -> Step:
    """A DPO step from per-token log-probabilities, as a user of the operator would write it."""

    def step(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            reference = log_probs(inputs.ref_hidden, inputs.ref_weight, inputs.targets)
        policy = log_probs(inputs.hidden, inputs.weight, inputs.targets)
        return dpo_loss(policy, reference, inputs)

    return step


def dpo_loss(logp: Tensor, ref_logp: Tensor, inputs: Inputs) -> Tensor:
    return -F.logsigmoid(BETA * _margin(logp - ref_logp, inputs)).mean()


def tdpo2_loss(logp: Tensor, ref_logp: Tensor, fkl: Tensor, inputs: Inputs) -> Tensor:
    """TDPO2: the KL of the rejected answer is pushed, that of the chosen one is a constant."""
    chosen, rejected = fkl.view(2, -1, inputs.T).sum(-1)
    margin = _margin(logp - ref_logp, inputs) - ALPHA * (rejected - chosen.detach())
    return -F.logsigmoid(BETA * margin).mean()


def _margin(per_token: Tensor, inputs: Inputs) -> Tensor:  # [N] -> [P]
    chosen, rejected = per_token.view(2, -1, inputs.T).sum(-1)
    return chosen - rejected


def mean_over_tokens(per_token: Tensor, inputs: Inputs) -> Tensor:
    return per_token.sum() / (inputs.targets != IGNORE).sum()


def kept_share(case: Case, budget: int | None) -> float:
    """Share of the scored rows whose logits fit prefkern's memory budget."""
    if budget is None:
        budget = table.DEFAULT_BUDGET["cpu"]
    per_row = case.backward_heads * case.shape.V * case.torch_dtype.itemsize
    return min(case.scored, budget // per_row) / case.scored
