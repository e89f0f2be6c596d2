"""OREO: policy and value from the soft Bellman residual of unpaired trajectories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import ragged
from ...ops.segment_sum import segment_sum
from ...stats import TokenStats
from .. import core, links
from .. import tokens as token
from ..declare import tokenwise
from ..record import Part


def _reads(*, kl: str = "rkl", **_: Any) -> tuple[str, ...]:
    core.choice("kl", kl, ("rkl", "fkl", "k3"))
    return ("logp",) if kl == "k3" else ("logp", kl)


@tokenwise(
    source="arXiv 2412.16145 eq. 7-10",
    status="paper read; policy and value losses checked against the authors' code, at step level "
    "too",
    reference=True,
    reads=_reads,
    parts=(Part("value", "the value is a constant that nothing learns", "a value head"),),
)
def oreo(
    tokens: TokenStats,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    scored: Tensor,  # [N]
    value: Tensor,  # [N]
    reward: Tensor,  # [S]
    beta: float = 0.03,
    alpha: float = 0.01,
    level: str = "token",
    kl: str = "rkl",
    step_index: Tensor | None = None,  # [N]
) -> Tensor:  # [S]
    """OREO: value and policy share a residual that is 0 when both are soft-optimal.

    l = mean_t (V_t - R + beta sum_{i >= t} rho_i)^2                            (gradient to V)
        + mean_t (V_t - R + beta rho_t + beta sum_{i > t} rho_i)^2              (gradient to rho_t)
        + alpha mean_t KL_t,  rho = logp - ref_logp
    level "step":      the same over steps k instead of tokens t: rho_k = sum of rho over step k,
                       V_k = V at the first token of step k, means over steps (KL: over tokens)
    level "response":  l = (V_0 - R + beta sum_t rho_t)^2 + alpha mean_t KL_t   (gradient to both)

    Wang et al. 2024 (arXiv 2412.16145), eq. 7-10.

    Args:
        tokens: Token statistics, each field `[N]`; needs `logp`, `ref_logp`, and `rkl` or `fkl` as
            `kl` says.
        value: `[N]` value head at the state that predicts each token, with gradient. Level "step"
            reads the one at the first scored token of each step, "response" the first.
        reward: `[S]` reward of the whole response.
        alpha: Weight of the KL, >= 0; 0.1 at step level and 0.3 at response level are usual.
        level: "token", "step" or "response".
        kl: "rkl" (KL(policy || reference), the shipped flags), "fkl", or "k3" (the code without its
            flag).
        step_index: `[N]` integers that do not fall within a response, the step a token belongs to;
            needed at level "step".

    Returns:
        Unreduced loss `[S]` fp64; an empty trajectory gives 0.
    """
    core.positive("beta", beta)
    core.not_negative("alpha", alpha)
    core.choice("level", level, ("token", "step", "response"))
    logp = token.field(tokens, "logp", scored)
    rho = logp - token.field(tokens, "ref_logp", scored)
    _reads(kl=kl)
    core.same_shape("value", value, "logp", logp)
    core.real("value", value)
    value = torch.where(scored, value, 0.0).double()
    terminal = core.data("reward", reward, segment_sum(rho.detach(), cu_seqlens))
    divergence = links.kl_estimate(rho, "k3") if kl == "k3" else token.field(tokens, kl, scored)
    penalty = alpha * token.sequence_mean(divergence, scored, cu_seqlens)
    total = segment_sum(rho, cu_seqlens)
    if level == "response":
        start = segment_sum(torch.where(_first(scored, cu_seqlens), value, 0.0), cu_seqlens)
        residual = start - terminal + beta * total
        filled = token.count(scored, cu_seqlens) > 0
        return torch.where(filled, residual.square(), 0.0) + penalty
    owner = ragged.owner(cu_seqlens, scored.numel())
    state, gain = scored, rho.double()  # one residual per scored token
    if level == "step":
        step = _step_of_token(step_index, scored, owner)
        state = _starts(step, scored)
        gain = gain.new_zeros(gain.numel() + 1).index_add(0, step, gain)[step]
        gain = torch.where(state, gain, 0.0)  # the step's sum, at its first token
    constant = gain.detach()
    # sum over later states of the sequence = everything before its end less everything up to here
    running = constant.cumsum(0)
    end = torch.cat([running.new_zeros(1), running])[cu_seqlens[1:].long()]
    future = end[owner] - running
    goal = terminal[owner]
    critic = value - goal + beta * (constant + future)
    actor = value.detach() - goal + beta * gain + beta * future
    squares = critic.square() + actor.square()
    return token.sequence_mean(squares, state, cu_seqlens) + penalty


def _step_of_token(step_index: Tensor | None, scored: Tensor, owner: Tensor) -> Tensor:  # [N] int64
    """A number of its own for every step of every sequence, in order; tokens that are not scored
    join the step of the scored token before them and add 0 to it."""
    if step_index is None or step_index.shape != scored.shape:
        got = "none" if step_index is None else f"{list(step_index.shape)}"
        raise ValueError(
            f"level 'step' needs step_index [N] = {list(scored.shape)}, got {got}; number the "
            "steps of each response."
        )
    largest = torch.iinfo(torch.int64).max
    core.integers("step_index", step_index, -largest, largest, "the step of each token")
    position = torch.arange(scored.numel(), device=scored.device)
    last = torch.where(scored, position, -1).cummax(0).values  # the latest scored token
    before = torch.cat([last.new_full((1,), -1), last])[:-1].clamp(min=0)
    unlike = (step_index != step_index[before]) | (owner != owner[before])
    new = scored & (unlike | (before == position) | ~scored[before])
    return new.long().cumsum(0)


def _starts(step: Tensor, scored: Tensor) -> Tensor:  # [N] bool
    """True at the first token of each step."""
    before = torch.cat([step.new_zeros(1), step])[:-1]
    return scored & (step != before)


def _first(scored: Tensor, cu_seqlens: Tensor) -> Tensor:  # [N] bool
    """True at the first scored token of each sequence."""
    position = scored.cumsum(0)
    before = torch.cat([position.new_zeros(1), position])[cu_seqlens[:-1].long()]
    return scored & (position - before[ragged.owner(cu_seqlens, scored.numel())] == 1)
