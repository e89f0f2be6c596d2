"""Token weights from what other frozen models make of each token: TGDPO, TIS-DPO, SePO.

Shapes: N packed tokens, S sequences. `scored` [N] is True where a token counts (its target is not
ignored); weights are exactly 0 elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import ragged
from ...ops.segment_sum import segment_sum
from .. import core
from ..record import TokenWeights

TRANSFORMS = ("exp", "origin", "threshold", "threshold_and_scale", "rank_based", "binary")


def tgdpo(
    aux_logp: Tensor,  # [N]
    ref_logp: Tensor,  # [N]
    sign: Tensor,  # [N]
    scored: Tensor | None = None,  # [N]
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    clamp: tuple[float, float] | None = None,
) -> TokenWeights:
    """Token reward guidance: f = 1 + sign alpha beta (aux_logp - ref_logp).

    Zhu et al. 2025 (arXiv 2506.14574), as in the authors' code; beta is the training beta.

    Args:
        aux_logp: `[N]` log-probability of each target under the frozen guiding model.
        ref_logp: `[N]` the same under the reference.
        sign: `[N]` +1 on tokens of chosen answers, -1 on rejected ones.
        scored: `[N]` bool, tokens that count; weights are 0 elsewhere. Default None, all.
        beta: The loss's beta, default 0.1.
        alpha: Strength of the guidance, default 0.5; 0 is DPO.
        clamp: Bounds of f, default None (an extreme token may weigh less than 0).

    Returns:
        Constant weights `[N]`.

    Raises:
        ValueError: shapes that differ.
    """
    core.same_shape("aux_logp", aux_logp, "ref_logp", ref_logp)
    core.same_shape("sign", sign, "ref_logp", ref_logp)
    core.real("aux_logp", aux_logp)
    reward = beta * (aux_logp.detach() - ref_logp.detach())
    weights = 1.0 + sign * (alpha * reward)
    if clamp is not None:
        weights = weights.clamp(*clamp)
    return TokenWeights(weights if scored is None else torch.where(scored, weights, 0.0))


def tisdpo(
    positive_logp: Tensor,  # [N]
    negative_logp: Tensor,  # [N]
    sign: Tensor,  # [N]
    scored: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    transform: str = "exp",
    k: float = 1.0,
    mu: tuple[float, float] = (1.0, -1.0),
    L: float = -0.5,
    U: float = 1.5,
    keep: float = 1.0,
) -> TokenWeights:
    """Importance of a token: how much likelier a model of good answers finds it than one of bad.

    exp (paper):  w = k exp(mu clamp(log positive / negative, L, U)), mu of the token's side
    others (code): x = sign (log positive - log negative), rounded to two decimals, then
        origin               x
        threshold            clamp(x, -1, 1)
        threshold_and_scale  clamp(x, -1.5, 1.5) mapped linearly to [0.7, 1.3]
        rank_based           rank of x within its answer mapped linearly to [0.7, 1.3]
        binary               1 for the share `keep` of highest x of the answer, 0 for the rest

    Liu et al. 2024 (arXiv 2410.04350), eq. 19; the bounds L and U are second-hand. The released
    code also gives the end-of-sequence token weight 0: multiply by a mask of your own for that.

    Args:
        positive_logp: `[N]` log-probability of each target under a model trained with DPO.
        negative_logp: `[N]` the same under a model trained with the pairs reversed.
        sign: `[N]` +1 on tokens of chosen answers, -1 on rejected ones.
        scored: `[N]` bool, tokens that count.
        cu_seqlens: `[S+1]` boundaries of the sequences.
        transform: One of the above, default "exp".
        k: Factor, default 1 (exp).
        mu: Exponents on chosen and on rejected answers, default (1, -1) (exp).
        L, U: Bounds of the log-ratio, default -0.5 and 1.5 (exp).
        keep: Share of tokens in (0, 1] that count, default 1 (binary).

    Returns:
        Constant weights `[N]`.

    Raises:
        ValueError: an unknown transform, L > U, keep outside (0, 1], shapes that differ.
    """
    for name, value in (("positive_logp", positive_logp), ("negative_logp", negative_logp)):
        core.same_shape(name, value, "scored", scored)
        core.real(name, value)
    core.choice("transform", transform, TRANSFORMS)
    if L > U:
        raise ValueError(f"L must not exceed U, got L={L}, U={U}.")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be in (0, 1], got {keep}.")
    ratio = positive_logp.detach() - negative_logp.detach()
    if transform == "exp":
        exponent = torch.where(sign > 0, mu[0], mu[1])
        weights = k * torch.exp(exponent.to(ratio.dtype) * ratio.clamp(L, U))
        return TokenWeights(torch.where(scored, weights, 0.0))
    x = sign * torch.round(ratio, decimals=2)
    if transform == "threshold":
        x = x.clamp(-1.0, 1.0)
    elif transform == "threshold_and_scale":
        x = 1.0 + 0.2 * x.clamp(-1.5, 1.5)
    elif transform in ("rank_based", "binary"):
        place = ragged.rank(x, scored, cu_seqlens).to(x.dtype)  # 0 for the lowest
        length = segment_sum(scored.to(torch.float32), cu_seqlens)
        count = ragged.spread(length, cu_seqlens, x.numel()).to(x.dtype)
        if transform == "rank_based":
            # a single token has no rank to speak of and takes the middle
            x = 0.7 + 0.6 * torch.where(count > 1, place / (count - 1).clamp(min=1), 0.5)
        else:
            x = (place >= count - torch.ceil(keep * count)).to(x.dtype)
        x = torch.where(ratio.isnan(), torch.nan, x)  # of what is no number no rank is known
    return TokenWeights(torch.where(scored, x, 0.0))


def sepo(
    oracle_logp: Tensor,  # [N]
    oracle_ref_logp: Tensor,  # [N]
    sign: Tensor,  # [N]
    scored: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    *,
    keep: float = 0.3,
) -> TokenWeights:
    """Selection: 1 / k on the k = ceil(keep n) telling tokens of an answer, 0 on the others.

    The reward of a token is oracle_logp - oracle_ref_logp; telling are the highest of a chosen
    answer and the lowest of a rejected one. The weighted sum of log-probabilities is their mean.

    Yang et al. 2024 (arXiv 2408.13518), second-hand.

    Args:
        oracle_logp: `[N]` log-probability of each target under a small model tuned with DPO.
        oracle_ref_logp: `[N]` the same under that model's own reference.
        sign: `[N]` +1 on tokens of chosen answers, -1 on rejected ones.
        scored: `[N]` bool, tokens that count.
        cu_seqlens: `[S+1]` boundaries of the sequences.
        keep: Share of the tokens that is trained, in (0, 1]; default 0.3.

    Returns:
        Constant weights `[N]`.

    Raises:
        ValueError: keep outside (0, 1], shapes that differ.
    """
    for name, value in (("oracle_logp", oracle_logp), ("oracle_ref_logp", oracle_ref_logp)):
        core.same_shape(name, value, "scored", scored)
        core.real(name, value)
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be in (0, 1], got {keep}.")
    reward = sign * (oracle_logp.detach() - oracle_ref_logp.detach())
    place = ragged.rank(reward, scored, cu_seqlens, descending=True)  # 0 for the most telling
    length = segment_sum(scored.to(torch.float32), cu_seqlens)
    selected = torch.ceil(keep * ragged.spread(length, cu_seqlens, scored.numel())).clamp(min=1)
    weights = torch.where(place < selected, 1.0 / selected, 0.0)
    # of what is no number no rank is known
    weights = torch.where(reward.isnan(), torch.nan, weights)
    return TokenWeights(torch.where(scored, weights, 0.0))
