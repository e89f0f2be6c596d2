"""Self-refined labels (SPA, "Selfie"): pairs the de-coupled model doubts get a softened label."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise

WINDOW = 50  # batches whose mean margins the threshold looks back on
NO_DOUBT = -1e30  # a threshold at which no pair is flagged; finite, so that means of it are


class SelfieState(NamedTuple):
    """Mean confidence margins of the last batches, at most 50, oldest first."""

    margins: tuple[float, ...] = ()


def update(
    state: SelfieState,
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    mix_chosen_logps: Tensor | None = None,  # [P]
    mix_rejected_logps: Tensor | None = None,  # [P]
    mixture: float = 1.0,
    beta: float = 0.1,
) -> SelfieState:
    """The state after this batch: its mean margin joins the window, the oldest leaves it."""
    margin = _confidence(chosen, rejected, mix_chosen_logps, mix_rejected_logps, mixture, beta)
    if margin.numel() == 0:
        return state
    return SelfieState((*state.margins, margin.mean().item())[-WINDOW:])


def _reads(mixture: float = 1.0, **_: object) -> tuple[str, ...]:
    return ("logp",) if mixture == 1.0 else ("logp", f"mix:{1.0 - mixture!r}")


@pairwise(
    source="arXiv 2406.04412",
    status="loss checked against the authors' code",
    reference=True,
    reads=_reads,
    read_as={"mix": "constant"},
    update=update,
)
def selfie(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    mix_chosen_logps: Tensor | None = None,  # [P]
    mix_rejected_logps: Tensor | None = None,  # [P]
    mixture: float = 1.0,
    beta: float = 0.1,
    alpha: float = 0.1,
    threshold: float = 0.0,
) -> Tensor:  # [P]
    """SPA: DPO whose label is 1 - alpha where a mixed model's margin is below a threshold.

    l = q softplus(-m) + (1 - q) softplus(m),  m = beta (logratio(chosen) - logratio(rejected)),
    q = 1 - alpha where c <= threshold, else 1,
    c = beta [(h(chosen) - ref(chosen)) - (h(rejected) - ref(rejected))]

    Kim et al. 2024 (arXiv 2406.04412), as in the authors' code. h is the summed log-probability
    under logits mixture z + (1 - mixture) z_ref, without gradient: statistic "mix:b" with
    b = 1 - mixture. The paper extrapolates away from the reference (mixture > 1, b < 0); the
    released setting is 1, the policy itself. What h then weighs is p^mixture / r^(mixture - 1),
    which has a sum unless the reference gives a token probability 0 that the policy does not: such
    a row is NaN.

    Args:
        mix_chosen_logps: `[P]` h of the chosen answer; None: that of `mixture`. Constant.
        mix_rejected_logps: `[P]` h of the rejected answer.
        mixture: Weight of the policy's logits in h, >= 0.
        alpha: Doubt about a flagged label, in [0, 0.5].
        threshold: Margin at or below which a pair is flagged.
    """
    core.positive("beta", beta)
    if not 0.0 <= alpha <= 0.5:
        raise ValueError(f"alpha must be in [0, 0.5], got {alpha}.")
    margin = beta * core.logratio_gap(chosen, rejected)
    core.not_negative("mixture", mixture)
    mixed = _confidence(chosen, rejected, mix_chosen_logps, mix_rejected_logps, mixture, beta)
    q = torch.where(mixed <= threshold, 1.0 - alpha, torch.ones_like(margin))
    return links.logistic(margin, q, 1.0 - q)


def _confidence(
    chosen: SeqStats,
    rejected: SeqStats,
    mix_chosen_logps: Tensor | None,  # [P]
    mix_rejected_logps: Tensor | None,  # [P]
    mixture: float,
    beta: float,
) -> Tensor:  # [P]
    """The mixed model's margin c of each pair, constant."""
    field = "logp" if mixture == 1.0 else "mix"
    if mix_chosen_logps is None:
        mix_chosen_logps = chosen.require(field).detach()
    if mix_rejected_logps is None:
        mix_rejected_logps = rejected.require(field).detach()
    like = core.difference(chosen.require("ref_logp"), rejected.require("ref_logp"))
    mixed = core.data("mix_chosen_logps", mix_chosen_logps, like) - chosen.require("ref_logp")
    other = core.data("mix_rejected_logps", mix_rejected_logps, like) - rejected.require("ref_logp")
    return beta * (mixed - other)


def threshold(state: SelfieState, share: float = 0.1) -> float:
    """The `share` quantile of the window, which `selfie` takes as `threshold`; NO_DOUBT before
    the first batch. The authors' window never drops a value, so theirs drifts."""
    if not state.margins:
        return NO_DOUBT
    return torch.tensor(state.margins, dtype=torch.float64).quantile(share).item()
