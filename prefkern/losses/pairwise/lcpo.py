"""LCPO (RE-PO): expectation-maximisation over which labels are right, around a base loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..record import Supervised

BASES = ("dpo", "ipo")
STATUS = (
    "a detailed note with equations; official code not available, the defaults beside eta are "
    "the base loss's"
)


def update(
    eta: float,
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.01,
    base: str = "dpo",
    norm: str = "sum",
    ema: float = 0.1,
) -> float:
    """The reliability of one annotator after a batch of their pairs:
    (1 - ema) eta + ema mean posterior."""
    return _moved(eta, _contrast(chosen, rejected, beta, base, norm), ema)


def update_simpo(
    eta: float,
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
    ema: float = 0.1,
) -> float:
    """As `update`, for lcpo_simpo."""
    return _moved(eta, _simpo_contrast(chosen, rejected, beta, gamma_beta_ratio), ema)


def update_cpo(
    eta: float,
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    ema: float = 0.1,
) -> float:
    """As `update`, for lcpo_cpo."""
    return _moved(eta, _cpo_contrast(chosen, rejected, beta), ema)


def _reads(norm: str = "sum", **_: object) -> tuple[str, ...]:
    return ("logp", "length") if norm == "mean" else ("logp",)


@pairwise(
    source="arXiv 2509.24159",
    status=STATUS,
    reference=True,
    reads=_reads,
    update=update,
)
def lcpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    eta: float | Tensor = 0.9,  # [P]
    beta: float = 0.01,
    base: str = "dpo",
    norm: str = "sum",
) -> Tensor:  # [P]
    """LCPO: soft labels from the posterior that a label is right, given the model and the
    annotator.

    l = w softplus(-D) + (1 - w) softplus(D),  w = sigmoid(stopgrad(D) + logit(eta)),
    D = base loss with the label reversed less the base loss: beta A (dpo), 2 A / beta (ipo),
    A = logratio(chosen) - logratio(rejected), of means per token for ipo with norm="mean"

    arXiv 2509.24159. At the first step w = eta: label smoothing with 1 - eta. Around SimPO and CPO,
    which need no reference, it is lcpo_simpo and lcpo_cpo.

    Args:
        eta: Reliability of the annotator of each pair, number or `[P]`, kept within [1e-4, 1 -
            1e-4]; prefkern.losses.pairwise.lcpo.update gives the next.
        beta: Of the base loss, > 0; by means ipo's own is 0.1.
        base: "dpo" or "ipo".
        norm: "mean" divides each log-ratio of ipo by its length, "sum" does not.
    """
    return _soft(_contrast(chosen, rejected, beta, base, norm), eta)


@pairwise(
    source="arXiv 2509.24159",
    status=STATUS,
    reads=("logp", "length"),
    score="mean_logp",
    rewards=core.mean_logp_rewards,
    update=update_simpo,
)
def lcpo_simpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    eta: float | Tensor = 0.9,  # [P]
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
) -> Tensor:  # [P]
    """LCPO around SimPO: its soft labels without a reference.

    l = w softplus(-D) + (1 - w) softplus(D),  w = sigmoid(stopgrad(D) + logit(eta)),
    D = softplus(z + gamma) - softplus(gamma - z),  gamma = beta gamma_beta_ratio,
    z = beta (mean_logp(chosen) - mean_logp(rejected))

    arXiv 2509.24159. |D| < |z| + gamma: the target margin steepens D around z = 0 by up to 2.

    Args:
        eta: As for `lcpo`; prefkern.losses.pairwise.lcpo.update_simpo gives the next.
        beta: Scale of the margin, > 0; the default is simpo's.
        gamma_beta_ratio: Target margin in nats per token, >= 0; the default is simpo's.
    """
    return _soft(_simpo_contrast(chosen, rejected, beta, gamma_beta_ratio), eta)


@pairwise(
    source="arXiv 2509.24159",
    status=STATUS + "; that the likelihood stays outside the soft labels is a guess",
    supervised=Supervised("cpo_alpha", 1.0),
    update=update_cpo,
)
def lcpo_cpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    eta: float | Tensor = 0.9,  # [P]
    beta: float = 0.1,
) -> Tensor:  # [P]
    """LCPO around CPO: its soft labels without a reference, plus the likelihood of every chosen
    answer.

    l = w softplus(-D) + (1 - w) softplus(D),  w = sigmoid(stopgrad(D) + logit(eta)),
    D = beta (logp(chosen) - logp(rejected)),
    objective: mean l + cpo_alpha * NLL(chosen) per token of the batch

    arXiv 2509.24159, which does not say whether a label in doubt weakens the likelihood term too;
    here it does not.

    Args:
        eta: As for `lcpo`; prefkern.losses.pairwise.lcpo.update_cpo gives the next.
        beta: Scale of the margin, > 0; the default is cpo's.
    """
    return _soft(_cpo_contrast(chosen, rejected, beta), eta)


def posterior(contrast: Tensor, eta: float | Tensor) -> Tensor:  # [P]
    """Probability that each label is right: sigmoid(D + logit(eta)), constant."""
    if not isinstance(eta, Tensor) and not 0.0 < eta < 1.0:
        raise ValueError(f"eta must be in (0, 1), got {eta}.")
    like = contrast.detach()
    eta = torch.as_tensor(core.per_item("eta", eta, like), dtype=like.dtype, device=like.device)
    return torch.sigmoid(like + torch.logit(eta.clamp(1e-4, 1.0 - 1e-4)))


def _soft(contrast: Tensor, eta: float | Tensor) -> Tensor:  # [P]
    weight = posterior(contrast, eta)
    return links.logistic(contrast, weight, 1.0 - weight)


def _moved(eta: float, contrast: Tensor, ema: float) -> float:
    if contrast.numel() == 0:
        return eta
    return (1.0 - ema) * eta + ema * posterior(contrast, eta).mean().item()


def _contrast(
    chosen: SeqStats, rejected: SeqStats, beta: float, base: str, norm: str
) -> Tensor:  # [P]
    core.positive("beta", beta)
    if base in ("simpo", "cpo"):
        raise ValueError(f'base must be one of {BASES}, got "{base}", which is loss lcpo_{base}.')
    core.choice("base", base, BASES)
    core.choice("norm", norm, ("mean", "sum"))
    if base == "dpo":
        if norm == "mean":
            raise ValueError('norm="mean" is for base="ipo", got base="dpo", which takes sums.')
        return beta * core.logratio_gap(chosen, rejected)
    if norm == "mean":
        gap = core.difference(chosen.mean_logratio, rejected.mean_logratio)
    else:
        gap = core.logratio_gap(chosen, rejected)
    return (2.0 / beta) * gap


def _simpo_contrast(
    chosen: SeqStats, rejected: SeqStats, beta: float, gamma_beta_ratio: float
) -> Tensor:  # [P]
    core.positive("beta", beta)
    core.not_negative("gamma_beta_ratio", gamma_beta_ratio)
    margin = beta * core.difference(chosen.mean_logp, rejected.mean_logp)
    target = beta * gamma_beta_ratio
    return links.logistic(-margin - target) - links.logistic(margin - target)


def _cpo_contrast(chosen: SeqStats, rejected: SeqStats, beta: float) -> Tensor:  # [P]
    core.positive("beta", beta)
    return beta * core.difference(chosen.require("logp"), rejected.require("logp"))
