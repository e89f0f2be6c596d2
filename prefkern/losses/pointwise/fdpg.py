"""f-DPG: policy gradient towards a target distribution under any f-divergence."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...stats import SeqStats
from .. import core, links
from ..declare import pointwise

WINDOW = 1024  # samples whose mean is the baseline, as in the authors' code


class FdpgState(NamedTuple):
    """The latest values of -f', at most WINDOW of them, oldest first."""

    recent: Tensor | None = None  # [<= WINDOW] fp64

    @property
    def mean(self) -> float | Tensor:  # []
        """The baseline of the next batch; 0 before the first."""
        return 0.0 if self.recent is None or not self.recent.numel() else self.recent.mean()


DIVERGENCES = ("forward_kl", "reverse_kl", "js", "tv", "chi2", "reverse_chi2")


@pointwise(
    source="arXiv 2302.08215", status="losses of four divergences checked against the authors' code"
)
def fdpg(
    seq: SeqStats,
    *,
    log_target_prob: Tensor,  # [S]
    proposal_logp: Tensor | None = None,  # [S]
    divergence: str = "js",
    baseline: float | Tensor = 0.0,
) -> Tensor:  # [S]
    """f-DPG: a surrogate whose gradient is that of an f-divergence from policy to target.

    l = -w A logp,  A = -f'(t) - baseline,  log t = logp - log_target_prob,  w = policy / proposal,
    w and A constant

    Go et al. 2023 (arXiv 2302.08215). f'(t): forward_kl -1/t, reverse_kl log t + 1,
    js log 2 - softplus(-log t), tv sign(log t) / 2, chi2 1 - t^-2, reverse_chi2 2 (t - 1).

    Args:
        seq: Statistics of sampled answers, each field `[S]`; needs `logp`.
        log_target_prob: `[S]` log of the normalised target P(x) / Z.
        proposal_logp: `[S]` log-probability under the model that drew the answers; None: the policy
            itself (w = 1).
        divergence: One of the above.
        baseline: Moving average of -f' before this batch, a number or 0-d tensor: state.mean, and
            after it state = prefkern.losses.pointwise.fdpg.update(state, seq, ...).

    Returns:
        Unreduced loss `[S]`; its value means nothing, its gradient is the point.
    """
    logp = seq.require("logp")
    advantage = advantages(logp, log_target_prob, divergence) - core.scalar(
        "baseline", baseline, logp
    )
    if proposal_logp is None:
        return -advantage * logp
    gap = logp.detach() - core.data("proposal_logp", proposal_logp, logp)
    return -torch.exp(gap.clamp(max=links.EXP_CLAMP)) * advantage * logp


def advantages(logp: Tensor, log_target_prob: Tensor, divergence: str) -> Tensor:  # [S]
    """-f'(t) without the baseline, constant; its running mean is the next baseline. Exponents are
    capped at 80."""
    core.choice("divergence", divergence, DIVERGENCES)
    logt = logp.detach() - core.data("log_target_prob", log_target_prob, logp)
    cap = links.EXP_CLAMP
    if divergence == "forward_kl":
        return torch.exp((-logt).clamp(max=cap))
    if divergence == "reverse_kl":
        return -(logt + 1.0)
    if divergence == "js":
        return -logsigmoid(logt) - math.log(2.0)
    if divergence == "tv":
        return -0.5 * torch.sign(logt)
    if divergence == "chi2":
        return torch.expm1((-2.0 * logt).clamp(max=cap))
    return -2.0 * torch.expm1(logt.clamp(max=cap))


def update(
    state: FdpgState,
    seq: SeqStats,
    *,
    log_target_prob: Tensor,  # [S]
    divergence: str = "js",
) -> FdpgState:
    """The state after this batch; call it after the loss, whose baseline is the one before."""
    found = advantages(seq.require("logp"), log_target_prob, divergence).double()
    if state.recent is not None:
        found = torch.cat([state.recent.to(found.device), found])
    return FdpgState(found[-WINDOW:])
