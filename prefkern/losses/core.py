"""Checks and small pieces shared by the losses of all families."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..ops import ragged
from ..ops.segment_sum import segment_sum
from ..stats import SeqStats

INF = float("inf")


def difference(chosen: Tensor, rejected: Tensor) -> Tensor:  # [P]
    """chosen - rejected, refusing shapes that would broadcast."""
    if chosen.shape != rejected.shape:
        raise ValueError(
            "chosen and rejected must hold the same number of sequences [P], got "
            f"{list(chosen.shape)} "
            f"and {list(rejected.shape)}; pass one chosen and one rejected answer per pair."
        )
    return chosen - rejected


def same_items(chosen: SeqStats, other: SeqStats) -> None:
    """Refuses rows of different size where no difference of theirs is formed."""
    difference(chosen.require("logp"), other.require("logp"))


def logratio_gap(chosen: SeqStats, rejected: SeqStats) -> Tensor:  # [P]
    """logratio(chosen) - logratio(rejected), in nats."""
    return difference(chosen.logratio, rejected.logratio)


def sequence_logratio(seq: SeqStats, reference_free: bool = False) -> Tensor:  # [S]
    """The log-ratio, or the log-probability itself where the reference is taken as 0."""
    return seq.require("logp") if reference_free else seq.logratio


def per_item(name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or a tensor of the shape of `like` (in its dtype, without gradient)."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.dim() != 0 and value.shape != like.shape:
        raise ValueError(
            f"{name} must be a number or a tensor {list(like.shape)} (one value per item), "
            f"got {list(value.shape)}."
        )
    real(name, value)
    return value.detach().to(like.dtype)


def real(name: str, value: Tensor, *, flags: bool = False) -> None:
    """Refuses a tensor of the caller that holds no real numbers; with `flags`, it may be bool."""
    if value.is_complex() or (value.dtype == torch.bool and not flags):
        raise ValueError(f"{name} must hold real numbers, got {value.dtype}.")


def integers(name: str, value: object, low: int, high: int, meaning: str) -> Tensor:
    """A tensor of integers from `low` to `high`. Values are read on a CPU only."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be integers ({meaning}), got {got}.")
    if checks.readable(value):
        bad = (value < low) | (value > high)
        if bool(bad.any()):
            raise ValueError(
                f"{name} must be from {low} to {high} ({meaning}), got {int(value[bad][0])}."
            )
    return value


def data(name: str, value: object, like: Tensor, *, flags: bool = False) -> Tensor:
    """A required constant tensor of the shape of `like`, in its dtype."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a tensor {list(like.shape)} (one value per item), got "
            f"{type(value).__name__}."
        )
    if value.shape != like.shape:
        raise ValueError(
            f"{name} must be {list(like.shape)} (one value per item), got {list(value.shape)}."
        )
    real(name, value, flags=flags)
    return value.detach().to(like.dtype)


def scalar(name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number or 0-d tensor, taken as a constant."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {list(value.shape)}.")
    real(name, value)
    return value.detach().to(like.dtype).reshape(())


def boolean(name: str, value: object, like: Tensor) -> Tensor:
    """A required bool tensor of the shape of `like`."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name} must be a bool tensor {list(like.shape)}, got {got}; a number or NaN is no "
            "label: "
            f"write the condition out, e.g. {name}=scores > 0."
        )
    if value.shape != like.shape:
        raise ValueError(
            f"{name} must be {list(like.shape)} (one value per sequence), got {list(value.shape)}."
        )
    return value


def same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuses a tensor per token of another shape than `other` [N]."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must be [N] = {list(other.shape)} to match {other_name}, got "
            f"{list(tensor.shape)}."
        )


def positive(name: str, value: float | Tensor) -> None:
    """Refuses a hyper-parameter that is not a finite number > 0; tensors off the CPU are taken as
    they are."""
    if not isinstance(value, Tensor):
        _hold(name, value, 0.0 < value < INF, "a finite number > 0")
    elif checks.readable(value):
        _hold(name, value, (value > 0) & (value < INF), "a finite number > 0")


def finite(name: str, value: float) -> None:
    _hold(name, value, abs(value) < INF, "a finite number")


def not_negative(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor):
        _hold(name, value, 0.0 <= value < INF, "a finite number >= 0")
    elif checks.readable(value):
        _hold(name, value, (value >= 0) & (value < INF), "a finite number >= 0")


def probability(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor):
        _hold(name, value, 0.0 <= value <= 1.0, "a probability, from 0 to 1")
    elif checks.readable(value):
        _hold(name, value, (value >= 0) & (value <= 1), "a probability, from 0 to 1")


def _hold(name: str, value: float | Tensor, good: bool | Tensor, words: str) -> None:
    if isinstance(good, Tensor) and isinstance(value, Tensor):
        if not bool(good.all()):
            bad = value.detach()[~good].reshape(-1)[0].item()
            raise ValueError(f"{name} must be {words}, got {bad}.")
    elif not good:
        raise ValueError(f"{name} must be {words}, got {value}.")


def choice(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")


def per_token(
    total: Tensor, length: Tensor, tokens_per_item: float | Tensor | None = None
) -> Tensor:  # [S]
    """total [S] over the mean length, so that its mean over items is the mean over their tokens.

    `tokens_per_item` replaces the batch's own mean length (gradient accumulation).
    """
    if tokens_per_item is not None:
        positive("tokens_per_item", tokens_per_item)
        return total / scalar("tokens_per_item", tokens_per_item, total)
    length = length.detach().to(total.dtype)
    return total * (length.numel() / length.sum().clamp(min=1.0))


def relevance_like(relevance: Tensor, scores: Tensor) -> Tensor:  # [S]
    """Relevance in the dtype of the scores, 0 where it is NaN (the answer is left out)."""
    known = torch.where(relevance.isnan(), 0.0, relevance)
    return data("relevance", known, scores)


def drop_empty(relevance: Tensor, length: Tensor | None) -> Tensor:  # [S]
    """Relevance with NaN where an answer has no scored token."""
    if length is None:
        return relevance
    return torch.where(data("length", length, relevance) > 0, relevance, torch.nan)


def group_sum(values: Tensor, relevance: Tensor, cu_groups: Tensor) -> Tensor:  # [G]
    """Sum over each list's answers whose relevance is a number."""
    checks.check_cu_seqlens(cu_groups, relevance.shape[0], name="cu_groups", of="items")
    kept = torch.where(relevance.isnan(), 0.0, values)
    return segment_sum(kept, cu_groups).to(values.dtype)


def best_nll(
    logp: Tensor | None, relevance: Tensor, cu_groups: Tensor, *, strict: bool = False
) -> Tensor:  # [G] fp64
    """Negative log-likelihood of the first answer of highest relevance of each list; `strict`: 0
    where all are equally relevant."""
    if logp is None:
        raise ValueError(
            "the likelihood term needs logp [S], the summed log-probability of each answer; pass "
            "it, or sft_weight=0."
        )
    real("logp", logp)
    if logp.shape != relevance.shape:
        raise ValueError(
            f"logp must be [S] = {list(relevance.shape)} to match relevance, got "
            f"{list(logp.shape)}."
        )
    best = ragged.first_best(relevance, cu_groups)
    if strict:
        best = best & ~ragged.first_best(-relevance, cu_groups)
    return segment_sum(torch.where(best, -logp, 0.0), cu_groups)


def logratio_rewards(
    seq: SeqStats, *, beta: float = 1.0, reference_free: bool = False, **_: Any
) -> Tensor:  # [S]
    """beta * log-ratio of the whole sequence: the implicit reward that trainers log."""
    return beta * sequence_logratio(seq, reference_free)


def logp_rewards(seq: SeqStats, *, beta: float = 1.0, **_: Any) -> Tensor:  # [S]
    """beta * log-probability of the whole sequence (losses without a reference)."""
    return beta * seq.require("logp")


def mean_logp_rewards(seq: SeqStats, *, beta: float = 1.0, **_: Any) -> Tensor:  # [S]
    """beta * log-probability per token (length-normalised losses without a reference)."""
    return beta * seq.mean_logp


def plain_mean_logp(seq: SeqStats, **_: Any) -> Tensor:  # [S]
    """Log-probability per token, for losses whose beta is no scale of it."""
    return seq.mean_logp


def token_rewards(seq: SeqStats, *, beta: float = 1.0, **_: Any) -> Tensor:  # [S]
    """beta * (log-ratio + KL(reference || policy)), both summed over tokens with their weights."""
    return beta * (seq.logratio + seq.require("fkl"))
