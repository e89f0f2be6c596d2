"""Token masks: SparsePO's, learned, and MaPO's, read off activations.

Shapes: N packed tokens, S sequences, L layers, M hooks, D hidden size. `scored` [N] is True where a
token counts (its target is not ignored); weights are exactly 0 elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops import ragged
from ...ops.segment_sum import segment_sum
from .. import core
from ..record import TokenWeights

# kl_direction -> the statistic that holds it
KL_FIELD = {"ref_pol": "fkl", "pol_ref": "rkl"}


def sparsepo(
    cu_seqlens: Tensor,  # [S+1]
    scored: Tensor,  # [N]
    reward_mask: Tensor | None,  # [N]
    kl_mask: Tensor | None,  # [N]
    *,
    rw_kl_independent: bool = True,
    l1_norm_param_u: float = 0.0,
    l1_norm_param_d: float = 0.0,
    kl_direction: str = "ref_pol",
) -> TokenWeights:
    """SparsePO: the reward mask weighs log-ratios, the KL mask weighs KLs, L1 norms are penalised.

    penalty = l1_u sum |reward_mask| + l1_d sum |kl_mask| per sequence; a common mask is penalised
    once, by the mean of the two coefficients.

    Christopoulou et al. 2024 (arXiv 2410.05102), as in the authors' code.

    Args:
        cu_seqlens: `[S+1]` boundaries of the sequences.
        scored: `[N]` bool, tokens that count.
        reward_mask: `[N]` weights of the log-ratios; None leaves them unmasked.
        kl_mask: `[N]` weights of the KLs; None leaves them unmasked.
        rw_kl_independent: False uses reward_mask for both (kl_mask must then be None).
        l1_norm_param_u: L1 coefficient of the reward mask, >= 0, default 0.
        l1_norm_param_d: L1 coefficient of the KL mask, >= 0, default 0.
        kl_direction: As in the loss, default "ref_pol".

    Returns:
        Weights per statistic, differentiable in the masks, and the penalty `[S]` (None when both
        coefficients are 0).

    Raises:
        ValueError: no mask at all, kl_mask beside a common mask, a negative coefficient, shapes.
    """
    if l1_norm_param_u < 0 or l1_norm_param_d < 0:
        raise ValueError(
            f"l1_norm_param_u and l1_norm_param_d must be >= 0, got {l1_norm_param_u}, "
            f"{l1_norm_param_d}."
        )
    core.choice("kl_direction", kl_direction, tuple(KL_FIELD))
    l1: tuple[tuple[Tensor | None, float], ...]
    if not rw_kl_independent:
        if reward_mask is None or kl_mask is not None:
            raise ValueError(
                "rw_kl_independent=False shares one mask: pass it as reward_mask and kl_mask=None."
            )
        kl_mask = reward_mask
        l1 = ((reward_mask, 0.5 * (l1_norm_param_u + l1_norm_param_d)),)
    else:
        l1 = ((reward_mask, l1_norm_param_u), (kl_mask, l1_norm_param_d))
    weights: dict[str, Tensor] = {}
    for name, field, mask in (
        ("reward_mask", "logp", reward_mask),
        ("kl_mask", KL_FIELD[kl_direction], kl_mask),
    ):
        if mask is not None:
            core.same_shape(name, mask, "scored", scored)
            core.real(name, mask, flags=True)
            weights[field] = torch.where(scored, mask, 0.0)
    if not weights:
        raise ValueError(
            "sparsepo needs reward_mask or kl_mask [N] (both None is tdpo1); get them from "
            "SparseMasks."
        )
    penalty = None
    for mask, coefficient in l1:
        if mask is not None and coefficient > 0:
            norm = segment_sum(torch.where(scored, mask, 0.0).abs(), cu_seqlens)
            penalty = coefficient * norm if penalty is None else penalty + coefficient * norm
    return TokenWeights(weights, penalty)


def mapo(
    cu_seqlens: Tensor,  # [S+1]
    scored: Tensor,  # [N]
    activations: Tensor,  # [M, N]
    hook_type: Tensor,  # [M]
) -> TokenWeights:
    """MaPO: a token weighs what its mean activation is between the sequence's least and greatest.

    m_t = mean over types of mean over the type's hooks of (a_t - min a) / (max a - min a), minimum
    and maximum over the scored tokens of the sequence; 1 where they coincide. The z-score of the
    authors' code cancels in this ratio and is left out, as is its fp16 rounding.

    Christopoulou et al. 2024 (arXiv 2410.05102), as in the authors' code.

    Args:
        cu_seqlens: `[S+1]` boundaries of the sequences.
        scored: `[N]` bool, tokens that count.
        activations: `[M, N]` activation of each hook, averaged over its features.
        hook_type: `[M]` int64, the kind of place a hook sits at, from 0.

    Returns:
        Constant weights `[N]`, 0 on tokens that do not count.

    Raises:
        ValueError: shapes that do not fit.
    """
    if activations.dim() != 2 or activations.shape[1:] != scored.shape or activations.shape[0] == 0:
        raise ValueError(
            f"activations must be [M, N] = [hooks, {scored.numel()}], got "
            f"{list(activations.shape)}; "
            "average each hook's activation over its features first."
        )
    if hook_type.shape != activations.shape[:1]:
        raise ValueError(
            f"hook_type must be [M] = [{activations.shape[0]}], got {list(hook_type.shape)}."
        )
    core.real("activations", activations)
    largest = torch.iinfo(torch.int64).max
    core.integers("hook_type", hook_type, -largest, largest, "the type of each hook")
    owner = ragged.owner(cu_seqlens, scored.numel()).expand_as(activations)  # [M, N]
    values = activations.detach().to(torch.float64)
    size = (activations.shape[0], cu_seqlens.numel() - 1)
    low, high = (
        values.new_full(size, -fill).scatter_reduce(
            1, owner, torch.where(scored, values, -fill), reduce
        )
        for reduce, fill in (("amin", -torch.inf), ("amax", torch.inf))
    )
    low, high = low.gather(1, owner), high.gather(1, owner)
    span = high - low
    # an activation that is no number stays one
    mask = torch.where(span <= 0, 1.0, (values - low) / torch.where(span > 0, span, 1.0))  # [M, N]
    # Mean over types of means over their hooks: every hook votes with 1 / (hooks of its type).
    vote = 1.0 / (hook_type[:, None] == hook_type[None, :]).sum(1)  # [M]
    mask = (vote[:, None] * torch.where(scored, mask, 0.0)).sum(0) / vote.sum()
    return TokenWeights(torch.where(scored, mask, 0.0))


class SparseMask(nn.Module):
    """SparsePO's learned token mask, read off the reference model's layers ("simple_all").

    a_lt = relu(w_l . LayerNorm(h_lt) + b_l),  mask_t = relu(sum_l c_l a_lt)

    One LayerNorm is shared by all layers. Every parameter name contains "_mask", which trainers use
    to give masks an optimizer group of their own. Values are >= 0, unbounded, with exact zeros.

    Args:
        num_layers: L, layers of the reference model (embeddings excluded).
        hidden_size: D.
        layer_norm_eps: The backbone's value, default 1e-5.
        dropout: Dropout after each ReLU, in [0, 1), default 0: masks are deterministic.
        dtype, device: Of the parameters; default torch's.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        layer_norm_eps: float = 1e-5,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1 or hidden_size < 1:
            raise ValueError(
                f"num_layers and hidden_size must be >= 1, got {num_layers} and {hidden_size}."
            )
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.norm_mask = nn.LayerNorm(hidden_size, eps=layer_norm_eps, **factory)
        self.layer_mask_weight = nn.Parameter(torch.empty(num_layers, hidden_size, **factory))
        self.layer_mask_bias = nn.Parameter(torch.empty(num_layers, **factory))
        self.mixer_mask_weight = nn.Parameter(torch.empty(num_layers, **factory))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws each weight as torch.nn.Linear would (uniform within 1 / sqrt(fan in))."""
        self.norm_mask.reset_parameters()
        layers, hidden = self.layer_mask_weight.shape
        nn.init.uniform_(self.layer_mask_weight, -(hidden**-0.5), hidden**-0.5)
        nn.init.uniform_(self.layer_mask_bias, -(hidden**-0.5), hidden**-0.5)
        nn.init.uniform_(self.mixer_mask_weight, -(layers**-0.5), layers**-0.5)

    def forward(
        self,
        states: Tensor,  # [L, N, D]
    ) -> Tensor:  # [N]
        """The mask of tokens whose reference hidden states after each layer are `states`."""
        if states.dim() != 3 or states.shape[::2] != self.layer_mask_weight.shape:
            layers, hidden = self.layer_mask_weight.shape
            raise ValueError(
                f"states must be [L, N, D] = [{layers}, N, {hidden}] (the reference's hidden "
                "states after "
                f"each layer), got {list(states.shape)}; leave the embeddings out."
            )
        normed = self.norm_mask(states.detach().to(self.layer_mask_weight.dtype))  # [L, N, D]
        layer = torch.einsum("lnd,ld->ln", normed, self.layer_mask_weight)
        layer = self.dropout(torch.relu(layer + self.layer_mask_bias[:, None]))
        return self.dropout(torch.relu(self.mixer_mask_weight @ layer))


class SparseMasks(nn.Module):
    """SparsePO's pair of masks: one for log-ratios, one for KLs, or one common to both.

    Args:
        num_layers, hidden_size: Of the reference model.
        rw_kl_independent: True gives each term a mask of its own, default True.
        mask_on_reward, mask_on_kl: False leaves a term unmasked (independent masks only).
        options: Further arguments of SparseMask.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        rw_kl_independent: bool = True,
        mask_on_reward: bool = True,
        mask_on_kl: bool = True,
        **options: object,
    ) -> None:
        super().__init__()
        if not (mask_on_reward or mask_on_kl):
            raise ValueError(
                "mask_on_reward and mask_on_kl are both False: nothing would be masked."
            )
        if not rw_kl_independent and not (mask_on_reward and mask_on_kl):
            raise ValueError(
                "rw_kl_independent=False uses one mask for both terms: leave mask_on_reward and "
                "mask_on_kl True, or use independent masks."
            )
        self.rw_kl_independent = rw_kl_independent
        shared: dict[str, Any] = options
        self.reward_mask = SparseMask(num_layers, hidden_size, **shared) if mask_on_reward else None
        own_kl = rw_kl_independent and mask_on_kl
        self.kl_mask = SparseMask(num_layers, hidden_size, **shared) if own_kl else None

    def forward(
        self,
        states: Tensor,  # [L, N, D]
    ) -> dict[str, Tensor | bool | None]:
        """The arguments reward_mask, kl_mask and rw_kl_independent of the sparsepo loss."""
        return {
            "reward_mask": None if self.reward_mask is None else self.reward_mask(states),
            "kl_mask": None if self.kl_mask is None else self.kl_mask(states),
            "rw_kl_independent": self.rw_kl_independent,
        }
