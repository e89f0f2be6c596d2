"""Liger's chunked preference losses.

What Liger drops without a word and these do not: the gradient of the auxiliary outputs (its
log-probabilities and rewards claim to need one and never pass it on), label_smoothing of a loss
type that it does not smooth (here: applied, or refused where the loss has none), a reference that
needs a gradient (here: refused). One number differs: `*_logits_mean` and `*_logits_sum` are over
labelled positions, since the others are never computed; Liger's count them.

Shapes: B rows of T tokens, chosen first and then rejected; D hidden size, V vocabulary, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import losses
from ...head import Head
from ...losses import links
from ...objective import segments
from ...ops.linear_stats import linear_logps
from ...stats import SeqStats, stat_dtype

Aux = tuple[Tensor, ...]


def _sequences(
    hidden: Tensor,  # [B, T, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [B, T]
    bias: Tensor | None,  # [V]
    ignore_index: int,
    stats: tuple[str, ...] = ("logp", "zmean"),
) -> SeqStats:
    tokens = linear_logps(
        hidden, Head(weight, bias), target, ignore_index=ignore_index, stats=stats,
        no_grad_stats=tuple(s for s in stats if s != "logp"),
    )  # fmt: skip
    bounds = segments.sequence_boundaries(target, None)
    return segments.sequence_stats(tokens, target, bounds, ignore_index=ignore_index)


def _reference(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, target: Tensor, index: int
) -> Tensor:
    """The reference's sums [B]."""
    if hidden is None or weight is None:
        raise ValueError(
            "use_ref_model=True needs ref_input and ref_weight; pass them, or set it to False."
        )
    if hidden.requires_grad or weight.requires_grad:
        raise ValueError(
            "ref_input and ref_weight must not require grad: no gradient reaches a reference; "
            "freeze it, run it under torch.no_grad(), or pass .detach()."
        )
    seq = _sequences(hidden, weight, target, bias, index, ("logp",))
    return seq.require("logp")


def _per_token(seq: SeqStats) -> SeqStats:
    """Mean log-probabilities in place of sums, so that a loss sees answers of one token."""
    length = seq.require("length").clamp(min=1)
    means = {
        n: getattr(seq, n) / length for n in ("logp", "ref_logp") if getattr(seq, n) is not None
    }
    return seq._replace(length=torch.ones_like(length), **means)


def _mean_logits(seq: SeqStats) -> Tensor:
    return (seq.require("zmean").sum() / seq.require("length").sum().clamp(min=1)).float()


class _Pairs(nn.Module):
    """What the pair losses share; a subclass says its loss and which rows it averages."""

    ignore_index: int
    beta: float

    def _settings(self, **settings: Any) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

    def _run(
        self,
        loss: Callable[[SeqStats, SeqStats], Tensor],
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        *,
        average: bool,
        alpha: float = 1.0,
        nll: bool = False,
        nll_target: Tensor | None = None,
        reference: Tensor | None = None,  # [B]
    ) -> tuple[Tensor, Aux, SeqStats, SeqStats]:
        if len(target) % 2:
            raise ValueError(
                f"the batch must hold chosen rows and as many rejected ones behind them, got "
                f"{len(target)} rows."
            )
        sums = _sequences(hidden, weight, target, bias, self.ignore_index)
        seq = sums._replace(ref_logp=reference)
        seq = _per_token(seq) if average else seq
        chosen, rejected = segments.split_rows(seq, 2, "halves", ("chosen", "rejected"))
        half = len(target) // 2
        logp, length = sums.require("logp")[:half], sums.require("length")[:half]
        if nll and nll_target is not None:
            wide = _sequences(
                hidden[:half], weight, nll_target[:half], bias, self.ignore_index, ("logp",)
            )
            logp, length = wide.require("logp"), wide.require("length")
        likelihood = -logp.sum() / length.sum() if nll else logp.new_zeros(())
        value = alpha * likelihood + loss(chosen, rejected).mean()
        zero = torch.zeros_like(logp[:1]) if reference is None else None
        rewards = [
            self.beta * (s.require("logp") - (zero if zero is not None else s.require("ref_logp")))
            for s in (chosen, rejected)
        ]
        means = [_mean_logits(s) for s in segments.split_rows(sums, 2, "halves", ("c", "r"))]
        aux = (
            chosen.require("logp").float(), rejected.require("logp").float(), *means,
            likelihood.float(), *(r.float() for r in rewards),
        )  # fmt: skip
        return value.to(stat_dtype(hidden.dtype)), aux, chosen, rejected


class LigerFusedLinearDPOLoss(_Pairs):
    """Liger's, with its ten loss types, `ipo` (which it has not) and every other pairwise loss of
    prefkern that reads log-probabilities alone."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        self._settings(
            ignore_index=ignore_index, beta=beta, alpha=alpha, compute_nll_loss=compute_nll_loss,
            compiled=compiled, use_ref_model=use_ref_model, average_log_prob=average_log_prob,
            chunk_size=chunk_size, loss_type=loss_type, label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
        )  # fmt: skip
        record, fixed = losses.resolve(loss_type)
        known = losses.arguments(record)
        if record.family != "pairwise" or losses.required(record) or record.rows[2:]:
            raise ValueError(
                f"loss_type {loss_type!r} reads more than the log-probabilities of pairs; call "
                "prefkern.preference_loss."
            )
        given = {"beta": beta, "tau": discopop_tau}
        self._args = fixed | {name: value for name, value in given.items() if name in known}
        if label_smoothing and "label_smoothing" not in known:
            raise ValueError(
                f"label_smoothing={label_smoothing}: loss_type {loss_type!r} has no smoothing, and "
                "Liger drops it; set it to 0."
            )
        if label_smoothing or loss_type in ("robust", "exo_pair"):
            self._args["label_smoothing"] = label_smoothing
        call = losses.bind(record, self._args)
        if set(call.stats) - {"length", "logp", "ref_logp"}:
            raise ValueError(
                f"loss_type {loss_type!r} reads {sorted(call.stats)}; call "
                "prefkern.preference_loss."
            )
        self._loss = record

    def forward(
        self,
        lin_weight: Tensor,  # [V, D]
        _input: Tensor,  # [B, T, D]
        target: Tensor,  # [B, T]
        bias: Tensor | None = None,  # [V]
        ref_input: Tensor | None = None,  # [B, T, D]
        ref_weight: Tensor | None = None,  # [V, D]
        ref_bias: Tensor | None = None,  # [V]
    ) -> tuple[Tensor, Aux]:
        """(loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards, rejected_rewards))."""
        settings: Any = self
        if settings.use_ref_model:
            reference = _reference(ref_input, ref_weight, ref_bias, target, self.ignore_index)
        else:
            reference = torch.zeros(len(target), dtype=torch.float64, device=target.device)

        def loss(chosen: SeqStats, rejected: SeqStats) -> Tensor:
            value: Tensor = self._loss(chosen, rejected, **self._args)
            return value

        value, aux, _, _ = self._run(
            loss, lin_weight, _input, target, bias, average=settings.average_log_prob,
            alpha=settings.alpha, nll=settings.compute_nll_loss, reference=reference,
        )  # fmt: skip
        return value, aux


class LigerFusedLinearCPOLoss(_Pairs):
    """Liger's."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self._settings(
            ignore_index=ignore_index, beta=beta, alpha=alpha, label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss, compiled=compiled,
            average_log_prob=average_log_prob, chunk_size=chunk_size,
        )  # fmt: skip

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Aux]:
        """As `LigerFusedLinearDPOLoss.forward`, without reference."""
        settings: Any = self
        record, _ = losses.resolve("cpo")
        args = {"beta": self.beta, "label_smoothing": settings.label_smoothing}
        value, aux, _, _ = self._run(
            lambda chosen, rejected: record(chosen, rejected, **args),
            lin_weight, _input, target, bias, average=settings.average_log_prob,
            alpha=settings.alpha, nll=settings.compute_nll_loss,
        )  # fmt: skip
        return value, aux


class LigerFusedLinearSimPOLoss(_Pairs):
    """Liger's; gamma is the margin itself, not its ratio to beta."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self._settings(
            ignore_index=ignore_index, beta=beta, alpha=alpha, label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss, compiled=compiled, gamma=gamma,
            chunk_size=chunk_size,
        )  # fmt: skip

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Aux]:
        """As `LigerFusedLinearDPOLoss.forward`, without reference; logps are means over tokens."""
        settings: Any = self
        record, _ = losses.resolve("simpo")
        args = {
            "beta": self.beta, "gamma_beta_ratio": settings.gamma / self.beta,
            "label_smoothing": settings.label_smoothing,
        }  # fmt: skip
        value, aux, _, _ = self._run(
            lambda chosen, rejected: record(chosen, rejected, **args),
            lin_weight, _input, target, bias, average=True, alpha=settings.alpha,
            nll=settings.compute_nll_loss,
        )  # fmt: skip
        return value, aux


class LigerFusedLinearORPOLoss(_Pairs):
    """Liger's."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self._settings(
            ignore_index=ignore_index, beta=beta, compute_nll_loss=compute_nll_loss,
            compiled=compiled, chunk_size=chunk_size,
        )  # fmt: skip

    def forward(
        self,
        lin_weight: Tensor,  # [V, D]
        _input: Tensor,  # [B, T, D]
        target: Tensor,  # [B, T]
        bias: Tensor | None = None,  # [V]
        nll_target: Tensor | None = None,  # [B, T]
    ) -> tuple[Tensor, Aux]:
        """As the others, and behind their seven (log_odds_ratio, log_odds_chosen), means over
        pairs. nll_target: labels of the likelihood term, such as the prompt's too."""
        settings: Any = self
        record, _ = losses.resolve("orpo")
        value, aux, chosen, rejected = self._run(
            lambda chosen, rejected: record(chosen, rejected, lam=self.beta),
            lin_weight, _input, target, bias, average=True, nll=settings.compute_nll_loss,
            nll_target=nll_target,
        )  # fmt: skip
        odds = links.log_odds(chosen.require("logp")) - links.log_odds(rejected.require("logp"))
        ratio = nn.functional.logsigmoid(odds).mean()
        return value, (*aux, ratio.float(), odds.mean().float())


class LigerFusedLinearKTOLoss(nn.Module):
    """Liger's."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.compiled = ignore_index, beta, compiled
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self,
        _input: Tensor,  # [B, T, D]
        lin_weight: Tensor,  # [V, D]
        target: Tensor,  # [B, T]
        bias: Tensor | None = None,  # [V]
        preference_labels: Tensor | None = None,  # [B] bool
        ref_input: Tensor | None = None,  # [B, T, D]
        ref_weight: Tensor | None = None,  # [V, D]
        ref_bias: Tensor | None = None,  # [V]
        kl: Tensor | None = None,  # [] or [B]
    ) -> tuple[Tensor, Aux]:
        """(loss, (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum,
        chosen_rewards_sum, rejected_rewards_sum)). Input before weight, the other way round than
        the pair losses, as in Liger."""
        if preference_labels is None:
            raise ValueError("preference_labels [B] must say which rows are desirable.")
        chosen = preference_labels.bool()
        seq = _sequences(_input, lin_weight, target, bias, self.ignore_index)
        vocabulary, logits = len(lin_weight), seq.require("zmean")
        reference = torch.zeros_like(seq.require("logp"))
        if self.use_ref_model:
            reference = _reference(ref_input, ref_weight, ref_bias, target, self.ignore_index)
        seq = seq._replace(ref_logp=reference)
        seq = _per_token(seq) if self.average_log_prob else seq
        logp = seq.require("logp")
        rewards = self.beta * (logp - seq.require("ref_logp"))
        # kl may be a number per row: the loss subtracts it from the log-ratio, so does this
        shift = torch.zeros_like(logp) if kl is None else kl.detach().to(logp.dtype).expand_as(logp)
        record, _ = losses.resolve("kto")
        value = record(
            seq._replace(ref_logp=seq.require("ref_logp") + shift), desirable=chosen,
            kl_baseline=0.0, beta=self.beta,
        ).mean()  # fmt: skip
        sums = [
            part.float()
            for x in (logp, vocabulary * logits, rewards)
            for part in (x[chosen].sum(), x[~chosen].sum())
        ]
        return value.to(stat_dtype(_input.dtype)), tuple(sums)
