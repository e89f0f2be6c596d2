"""Liger's fused linear cross-entropy.

What Liger drops without a word and this does not: the gradient of z_loss, and the gradient of the
weight where the hidden states are frozen. label_smoothing with softcap is refused: the sum of
capped logits is no linear function of the hidden state.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...head import Head
from ...ops.linear_stats import linear_logps

_TILE = 8192  # columns of logits at a time where the largest is looked for


class CrossEntropyOutput(NamedTuple):
    loss: Tensor  # scalar, or [N] for reduction="none"
    z_loss: Tensor | None = None  # as loss
    token_accuracy: Tensor | None = None  # as loss
    predicted_tokens: Tensor | None = None  # [N] int64, -1 where the target is ignored


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """loss = mean over tokens of w_y [(1 - e) (lse - z_y) + ...] + lse_square_scale lse^2.

    With e = label_smoothing and class weights w (1 without ce_weight), a token's loss is
    (1 - e) w_y (lse - z_y) + e/V sum_v w_v (lse - z_v), and its z-loss lse_square_scale lse^2.
    "mean" divides the first by the sum of w_y, the second by the number of tokens.

    Args:
        ce_weight: `[V]`. Default None, all 1.
        ignore_index: Label of tokens that are not scored. Default -100.
        lse_square_scale: Weight of the z-loss. Default 0.
        label_smoothing: In [0, 1]. Default 0.
        reduction: "mean" (default), "sum" or "none".
        softcap: z = softcap tanh(logit / softcap). Default None.
        return_z_loss, return_token_accuracy, return_predicted_tokens: Return a
            `CrossEntropyOutput` with these. Predicted tokens cost one more product over the head.
        accum_dtype: No effect, gradients are accumulated in fp32.
        use_token_scaling: Multiplies a token's loss by its probability, held constant.

    Raises:
        ValueError: a value outside its range, label_smoothing with softcap.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}.")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap must be positive or None, got {softcap}.")
        if label_smoothing and softcap is not None:
            raise ValueError(
                "label_smoothing with softcap needs the gradient of every capped logit of a token; "
                "leave one of them out."
            )
        self.ce_weight, self.ignore_index = ce_weight, ignore_index
        self.lse_square_scale, self.label_smoothing = lse_square_scale, label_smoothing
        self.reduction, self.softcap, self.return_z_loss = reduction, softcap, return_z_loss
        self.accum_dtype, self.use_token_scaling = accum_dtype, use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self,
        lin_weight: Tensor,  # [V, D]
        _input: Tensor,  # [N, D]
        target: Tensor,  # [N]
        bias: Tensor | None = None,  # [V]
    ) -> Tensor | CrossEntropyOutput:
        """The loss; a `CrossEntropyOutput` where more is returned."""
        stats = ["logp"]
        smooth = self.label_smoothing
        if self.lse_square_scale or self.return_z_loss or smooth:
            stats.append("lse")
        if self.return_token_accuracy:
            stats.append("top1")
        head = Head(lin_weight, bias, softcap=self.softcap)
        tokens = linear_logps(
            _input, head, target, ignore_index=self.ignore_index, stats=tuple(stats)
        )
        scored = target != self.ignore_index
        count = scored.sum()
        logp, lse = tokens.logp, tokens.lse
        assert logp is not None
        weight = None
        if self.ce_weight is not None:
            weight = self.ce_weight.to(logp)[torch.where(scored, target, 0)] * scored
        loss = -logp if weight is None else -logp * weight
        if smooth:
            loss = (1 - smooth) * loss + smooth * self._spread(lse, lin_weight, _input, bias)
            loss = loss * scored
        z_loss = torch.zeros_like(loss) if lse is None else self.lse_square_scale * lse.square()
        total = count if weight is None else weight.sum()
        if self.reduction == "mean":
            loss, z_loss = loss / total, z_loss / count
        loss = loss + z_loss
        if self.use_token_scaling:
            scale = logp.detach().exp() * scored
            loss, z_loss = loss * scale, z_loss * scale
        accuracy = tokens.top1
        if self.reduction != "none":
            loss, z_loss = loss.sum(), z_loss.sum()
            accuracy = None if accuracy is None else accuracy.sum() / count
        if not (self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens):
            return loss
        predicted = None
        if self.return_predicted_tokens:
            predicted = _largest(_input, lin_weight, bias).masked_fill(~scored, -1)
        return CrossEntropyOutput(loss, z_loss if self.return_z_loss else None, accuracy, predicted)

    def _spread(
        self, lse: Tensor | None, weight: Tensor, hidden: Tensor, bias: Tensor | None
    ) -> Tensor:
        """1/V sum_v w_v (lse - z_v) of every token [N]: z is linear in the hidden state, so its sum
        is one vector for all tokens."""
        assert lse is not None
        w = weight.new_ones(len(weight)) if self.ce_weight is None else self.ce_weight.to(weight)
        logits = (hidden.to(weight.dtype) @ (w @ weight)).to(lse)
        if bias is not None:
            logits = logits + (w * bias).sum()
        return (w.sum() * lse - logits) / len(weight)


@torch.no_grad()
def _largest(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The column of each token's largest logit [N], the first of equals; a soft cap keeps it."""
    best = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    index = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    for start in range(0, len(weight), _TILE):
        logits = (hidden @ weight[start : start + _TILE].t().to(hidden.dtype)).float()
        if bias is not None:
            logits = logits + bias[start : start + _TILE]
        value, at = logits.max(1)
        better = value > best
        best, index = torch.where(better, value, best), torch.where(better, at + start, index)
    return index
