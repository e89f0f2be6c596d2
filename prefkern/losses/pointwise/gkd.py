"""Distillation divergences and the entropy bonus: means over tokens of one statistic."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..declare import pointwise

# Closer to 0 or 1 than this, an alpha or Renyi divergence is its limit, a KL.
ORDER_LIMIT = 1e-4


def _distill_reads(
    *, divergence: str = "fkl", order: float = 0.5, top_k: int = 50, **_: Any
) -> tuple[str, ...]:
    core.choice("divergence", divergence, ("fkl", "rkl", "tv", "alpha", "renyi", "bkl"))
    if divergence == "bkl":
        return (f"bkl:{top_k}",)
    if divergence not in ("alpha", "renyi"):
        return (divergence,)
    if not 0.0 <= order <= 1.0 or (divergence == "renyi" and order < ORDER_LIMIT):
        raise ValueError(
            f"order must be in [0, 1] for alpha and in [{ORDER_LIMIT}, 1] for renyi, got {order}."
        )
    if order > 1.0 - ORDER_LIMIT:
        return ("fkl",)
    if order < ORDER_LIMIT:
        return ("rkl",)
    return (f"{divergence}:{float(order)!r}",)


def _gkd_reads(*, beta: float = 0.5, **_: Any) -> tuple[str, ...]:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1] (weight of the teacher), got {beta}.")
    if beta in (0.0, 1.0):
        return ("fkl" if beta == 0.0 else "rkl",)
    return (f"jsd:{float(beta)!r}",)


@pointwise(
    source="arXiv 2306.13649", status="checked against TRL", reads=_gkd_reads, items="scored_tokens"
)
def gkd(seq: SeqStats, *, beta: float = 0.5) -> Tensor:  # [S]
    """GKD: generalised Jensen-Shannon divergence between teacher and policy, per token.

    l = sum over tokens of b KL(r || m) + (1-b) KL(p || m),  m = b r + (1-b) p;
    KL(r || p) for b = 0 and KL(p || r) for b = 1, where r is the teacher

    Agarwal et al. 2023 (arXiv 2306.13649), as in TRL. The teacher is given as the reference model;
    the objective divides by the number of tokens.

    Args:
        seq: Statistics of the answers, each field `[S]`; needs `jsd`, `fkl` (b = 0) or `rkl` (b =
            1).
        beta: b in [0, 1], weight of the teacher in the mixture.

    Returns:
        Sums over tokens `[S]`.
    """
    return seq.require(_gkd_reads(beta=beta)[0].partition(":")[0])


@pointwise(
    source="arXiv 2306.13649, arXiv 2307.15190",
    status="standard divergences, proven against the full softmax",
    reads=_distill_reads,
    items="scored_tokens",
)
def distill(
    seq: SeqStats, *, divergence: str = "fkl", order: float = 0.5, top_k: int = 50
) -> Tensor:  # [S]
    """Any divergence between teacher and policy, per token.

    l = sum over tokens of D(teacher, policy):  fkl KL(r || p), rkl KL(p || r), tv 1/2 sum |p - r|,
    alpha (1 - S) / (a (1-a)) and renyi log S / (a-1) with S = sum r^a p^(1-a), bkl KL(r || p) over
    the teacher's top entries and one rest bucket

    Standard divergences; as distillation losses in f-distill (arXiv 2307.15190) and GKD
    (arXiv 2306.13649). The teacher is given as the reference model; the objective divides by the
    number of tokens.

    Args:
        seq: Statistics of the answers, each field `[S]`; needs the one named by `divergence`.
        divergence: "fkl", "rkl", "tv", "alpha", "renyi" or "bkl".
        order: a in [0, 1] of alpha and renyi; within 1e-4 of an end the limit, a KL, is taken
            (renyi at 0 has none and is refused).
        top_k: Size of bkl's top set.

    Returns:
        Sums over tokens `[S]`.
    """
    stats = _distill_reads(divergence=divergence, order=order, top_k=top_k)
    return seq.require(stats[0].partition(":")[0])


@pointwise(
    source="arXiv 1602.01783", status="standard algebra", reads=("ent",), items="scored_tokens"
)
def entropy_bonus(seq: SeqStats, *, coef: float = 0.01) -> Tensor:  # [S]
    """Entropy bonus: rewards an undecided next-token distribution.

    l = -coef sum over tokens of H(p)

    Standard in policy-gradient training (arXiv 1602.01783); one term beside others. The objective
    divides by the number of tokens.

    Args:
        coef: Weight.

    Returns:
        Sums over tokens `[S]`.
    """
    return -coef * seq.require("ent")
