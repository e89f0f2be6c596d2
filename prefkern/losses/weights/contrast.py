"""Token weights from two contrastive models (TIS-DPO) and from steps of a response (tree style).

Shapes: N packed tokens, S sequences. `scored` [N] is True where a token counts; weights are exactly
0 elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.segment_sum import segment_sum
from ..record import TokenWeights
from .token_weights import sequence_of

TRANSFORMS = ("exp", "origin", "threshold", "threshold_and_scale", "rank_based", "binary")


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
        if value.shape != scored.shape:
            raise ValueError(
                f"{name} must be [N] = {list(scored.shape)}, got {list(value.shape)}; score every "
                "target with that model."
            )
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {TRANSFORMS}, got {transform!r}.")
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
        place, count = _rank_in_sequence(x, scored, cu_seqlens)  # 0 for the lowest
        if transform == "rank_based":
            # a single token has no rank to speak of and takes the middle
            x = 0.7 + 0.6 * torch.where(count > 1, place / (count - 1).clamp(min=1), 0.5)
        else:
            x = (place >= count - torch.ceil(keep * count)).to(x.dtype)
    return TokenWeights(torch.where(scored, x, 0.0))


def _rank_in_sequence(
    x: Tensor, scored: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:  # [N], [N] in the dtype of x
    """Ascending 0-based rank among a sequence's scored tokens (ties by position), their number."""
    owner = sequence_of(cu_seqlens, scored)
    order = torch.argsort(x, stable=True)
    order = order[torch.argsort((~scored)[order].long(), stable=True)]  # unscored tokens come last
    order = order[torch.argsort(owner[order], stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    count = segment_sum(scored.to(torch.float32), cu_seqlens)[owner]
    return (place - cu_seqlens.long()[owner]).to(x.dtype), count.to(x.dtype)


def tree_tpo(
    cu_seqlens: Tensor,  # [S+1]
    scored: Tensor,  # [N]
    step_index: Tensor,  # [N]
    cosine: Tensor,  # [N]
) -> TokenWeights:
    """Weights that turn a sum over tokens into a weighted mean of step means.

    w_t = c_k / (n_k sum_k' c_k'),  c_k = 1 + cosine of step k,  n_k its number of tokens

    In the style of Tree-TPO (arXiv 2410.12854); its equations were not read.

    Args:
        cu_seqlens: `[S+1]` boundaries of the sequences.
        scored: `[N]` bool, tokens that count.
        step_index: `[N]` integers, the step a token belongs to, from 1; 0 for none.
        cosine: `[N]` cosine in [-1, 1] of the token's step with the same step of the best answer,
            from `step_cosine`.

    Returns:
        Constant weights `[N]`; an answer without steps has weights 0.

    Raises:
        ValueError: shapes that differ, negative steps (checked on the CPU).
    """
    for name, value in (("step_index", step_index), ("cosine", cosine)):
        if value.shape != scored.shape:
            raise ValueError(
                f"{name} must be [N] = {list(scored.shape)}, got {list(value.shape)}; spread a "
                "step's number over its tokens."
            )
    readable = step_index.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and bool((step_index < 0).any()):
        raise ValueError(
            f"step_index must be >= 0 (0 for tokens outside steps), got {int(step_index.min())}."
        )
    counted = scored & (step_index > 0)
    owner = sequence_of(cu_seqlens, scored)
    step = _number(_key(owner, step_index))
    size = torch.zeros_like(cosine, dtype=torch.float64).index_add(0, step, counted.double())
    share = torch.where(counted, (1.0 + cosine.double()) / size[step].clamp(min=1), 0.0)
    total = segment_sum(share, cu_seqlens)[owner]  # over a step's tokens it adds up to c_k
    return TokenWeights(torch.where(counted, share / torch.where(total > 0, total, 1.0), 0.0))


def step_cosine(
    states: Tensor,  # [N, D]
    cu_seqlens: Tensor,  # [S+1]
    cu_groups: Tensor,  # [G+1]
    labels: Tensor,  # [S]
    scored: Tensor,  # [N]
    step_index: Tensor,  # [N]
) -> Tensor:  # [N]
    """Cosine of each step's mean hidden state with the same step of its list's best answer.

    The argument `cosine` of `tree_tpo`; the released code compares with the answer stored first,
    which is the best where answers are sorted. A step that the best answer does not have gets -1,
    and so the weight 0, as there.

    Args:
        states: `[N, D]` hidden states of the last layer. Constant.
        cu_seqlens: `[S+1]` boundaries of the sequences.
        cu_groups: `[G+1]` boundaries of the lists, on the sequence axis.
        labels: `[S]` value of each answer; the first of the highest is the best, NaN is no answer.
        scored: `[N]` bool, tokens that count.
        step_index: `[N]` integers, the step a token belongs to, from 1; 0 for none.

    Returns:
        Constant `[N]` in the dtype of states (fp32 for narrower ones); -1 outside steps.

    Raises:
        ValueError: shapes that differ.
    """
    if states.dim() != 2 or scored.shape != states.shape[:1] or step_index.shape != scored.shape:
        raise ValueError(
            f"states must be [N, D], scored and step_index [N], got {list(states.shape)}, "
            f"{list(scored.shape)} and {list(step_index.shape)}."
        )
    if labels.shape != (cu_seqlens.numel() - 1,):
        raise ValueError(
            f"labels must be [S] = [{cu_seqlens.numel() - 1}], got {list(labels.shape)}."
        )
    states = states.detach()
    if states.dtype in (torch.float16, torch.bfloat16):
        states = states.float()
    counted = scored & (step_index > 0)
    owner = sequence_of(cu_seqlens, scored)
    group = sequence_of(cu_groups, labels)
    size = cu_groups.numel() - 1
    value = torch.where(labels.isnan(), -torch.inf, labels)
    top = value.new_full((size,), -torch.inf).scatter_reduce(0, group, value, "amax")
    item = torch.arange(len(labels), device=labels.device)
    is_top = (value == top[group]) & ~labels.isnan()
    best = item.new_full((size,), len(labels)).scatter_reduce(
        0, group, torch.where(is_top, item, len(labels)), "amin"
    )
    # Means over a step's tokens need no division: a cosine does not see lengths.
    own = _number(_key(owner, step_index))
    n, width = states.shape
    total = states.new_zeros(n, width).index_add(0, own, torch.where(counted[:, None], states, 0.0))
    # The best answer's sum of the same step, under the key (list, step).
    shared = _number(_key(group[owner], step_index))
    from_best = counted & (owner == best[group[owner]])
    wanted = states.new_zeros(n, width).index_add(
        0, shared, torch.where(from_best[:, None], states, 0.0)
    )
    there = torch.zeros_like(step_index, dtype=torch.bool).index_put(
        (shared[from_best],), torch.ones_like(from_best[from_best])
    )
    cosine = torch.nn.functional.cosine_similarity(total[own], wanted[shared], dim=1)
    return torch.where(counted & there[shared], cosine, -1.0)


def _key(owner: Tensor, step_index: Tensor) -> Tensor:  # [N] int64
    """One key per (owner, step); the number of steps never exceeds the number of tokens."""
    n = owner.numel()
    return owner * (n + 1) + step_index.long().clamp(max=n)


def _number(key: Tensor) -> Tensor:  # [N] int64
    """The rank of each token's key among the distinct ones."""
    key, order = torch.sort(key)
    new = torch.ones_like(key)
    new[1:] = (key[1:] != key[:-1]).long()
    number = torch.empty_like(order)
    number[order] = new.cumsum(0) - 1
    return number
