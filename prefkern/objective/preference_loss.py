"""preference_loss: from hidden states to one scalar and the metrics trainers log.

ops (token statistics) -> token weights -> sequence sums -> loss -> reduction. Nothing below knows
which loss is computed; nothing above knows how.

Shapes: N tokens, V vocabulary, D hidden size, S sequences, P pairs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks, losses
from ..backends.choice import use_backend
from ..head import HeadLike, as_head
from ..losses.binding import LossLike
from ..stats import TokenStats, stat_dtype
from . import segments
from .given import check_labels, check_num_items, check_options, checked_weights
from .models import Models, check_reference_values, reference_source, token_statistics
from .terms import (
    Objective,
    StateArguments,
    Term,
    bind_terms,
    check_likelihood_targets,
    check_names,
    only_scored,
    reduce,
    term_metrics,
    weight_stage,
    with_state,
)  # fmt: skip


def preference_loss(
    hidden: Tensor,  # [N, D] or [B, T, D]
    head: HeadLike,  # [V, D]
    targets: Tensor,  # [N] or [B, T]
    cu_seqlens: Tensor | None = None,  # [S+1]
    *,
    loss: LossLike | Sequence[LossLike] = "dpo",
    loss_weights: Sequence[float] | None = None,
    ref_hidden: Tensor | None = None,  # [N, Dr] or [B, T, Dr]
    ref_head: HeadLike | None = None,  # [V, Dr]
    ref_logp: Tensor | None = None,  # [N] or [B, T]
    ref_seq_logp: Tensor | None = None,  # [S]
    aux_hidden: Tensor | None = None,  # [N, Da] or [B, T, Da]
    aux_head: HeadLike | None = None,  # [V, Da]
    values: Tensor | tuple[Tensor, Tensor] | None = None,  # [V], or (index, value) each [N, k]
    layout: str = "pairs",
    cu_groups: Tensor | None = None,  # [G+1]
    relevance: Tensor | None = None,  # [S]
    desirable: Tensor | None = None,  # [S] bool
    token_weights: Tensor | Mapping[str, Tensor] | None = None,
    item_weights: Tensor | None = None,  # [P], [G] or [S]
    num_items: Mapping[str, float | Tensor] | None = None,
    metrics: bool = True,
    likelihood_targets: Tensor | None = None,  # like targets
    state_arguments: StateArguments | None = None,
    ignore_index: int = -100,
    num_scored: int | None = None,
    memory_budget: int | None = None,
    tail_mass: float = 0.0,
    backend: str = "auto",
    **loss_args: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A preference loss of policy hidden states, without [N, V] logits.

    Args:
        hidden, head, targets: As in `linear_logps`. `[B, T]` input: every row is one sequence.
        cu_seqlens: Boundaries of the packed sequences `[S+1]` int32 on the flattened token axis.
        loss: A name of `prefkern.LOSSES` (or a TRL `loss_type`), a function of `prefkern.losses`, a
            record of `LOSSES`, or several. A name may bring arguments of its own, which stand above
            those of the call: "tdpo2:alpha=0.5".
        loss_weights: One factor per loss. Default 1 each.
        ref_hidden, ref_head: The reference's hidden states for the same tokens and its head (None:
            the policy's). Or
        ref_logp: the reference's log-probability of each target, like `targets` (nats). Or
        ref_seq_logp: its sum over each sequence `[S]`; fp32 sums are compared with the policy's in
            fp32, so that equal models give 0. At most one of the three.
        aux_hidden, aux_head, values: A of the statistic `ev`, as in `linear_divergence`.
        layout: How sequences form pairs: "pairs" (chosen, rejected neighbours) or "halves"; for
            `sft`, which reads the chosen answer alone, also "unpaired" (every sequence is one).
            Losses of lists or of single answers form no pairs: "lists" or "unpaired" says so.
        cu_groups: Boundaries of the lists `[G+1]` on the sequence axis, for listwise losses.
        relevance: Per sequence `[S]`, for listwise losses: higher is better, NaN leaves out.
        desirable: Per sequence `[S]` bool, for losses of single answers.
        token_weights: One tensor like `targets` for all statistics or a dict statistic -> tensor;
            multiplies the weights a loss brings along. A weight of 0 does not drop a row.
        item_weights: Constant factor of each pair `[P]`, list `[G]` or sequence `[S]` in the sum of
            the loss; denominators still count every item. Losses over sequences or tokens take that
            of their group (`cu_groups` given) or sequence. Default None (1).
        num_items: Denominators "pairs", "groups", "sequences", "tokens" (of likelihood terms) and
            "scored_tokens" (of token means) that replace the batch's own counts (gradient
            accumulation, data parallelism). Default: the batch's counts.
        metrics: Also compute what trainers log. Default True. Their extra statistics are top1,
            zmean and the entropy, without gradient: they add no product. With `tail_mass` also
            perf/active_share, the share of the vocabulary that the backward computes.
        likelihood_targets: Labels of the likelihood terms (ORPO's, `sft`) and of bialign's KL where
            those score more than `targets` does, such as the prompt too; equal to `targets` where
            that counts.
            Their tokens count as scored for num_scored and in the default denominator. Default
            None, `targets`.
        state_arguments: Called for every loss that keeps a state between batches (bco, beta_dpo,
            lcpo, lcpo_simpo, lcpo_cpo, selfie) with its record, the detached statistics of its
            rows and its hyper-parameters, before the loss; returns the arguments that the state
            gives, such as {"delta": state.mean} after
            `state = record.update(state, *rows, beta=beta)`. Default None: pass them yourself.
        ignore_index, num_scored, memory_budget, tail_mass: As in `linear_logps`.
        backend: Serves every op of the call, those inside a loss included. Default "auto".
        **loss_args: The loss's own (beta, alpha, kl_baseline, aux_logp ...), checked against its
            signature.

    Returns:
        (loss, metrics): a scalar (fp32; fp64 for fp64 hidden) and a dict of detached 0-d tensors.

    Raises:
        ValueError: an unknown loss or argument (nearest names given), a reference that cannot give
            what the loss needs, layouts and shapes that do not fit, an empty batch.
    """
    checks.check_integer_targets("targets", targets)
    checks.check_float("hidden", hidden)
    checks.check_ignore_index(ignore_index)
    check_options(layout, metrics, state_arguments)
    models = Models(
        hidden, as_head(head), ref_hidden,
        None if ref_head is None else as_head(ref_head, "ref_head"), ref_logp, ref_seq_logp,
        aux_hidden, None if aux_head is None else as_head(aux_head, "aux_head"), values,
    )  # fmt: skip
    cu_seqlens = segments.sequence_boundaries(targets, cu_seqlens)
    check_labels(cu_groups, relevance, desirable, cu_seqlens.numel() - 1)
    terms, user, counts = _bound(
        loss, loss_weights, loss_args, targets, token_weights, num_items,
        stateful=state_arguments is not None,
    )  # fmt: skip
    source = reference_source(models, terms, user, targets, ignore_index)
    wide = targets if likelihood_targets is None else likelihood_targets
    check_likelihood_targets(terms, wide, targets, ignore_index)
    with _on(backend):
        tokens = token_statistics(
            models, wide, terms, source, metrics=metrics,
            ignore_index=ignore_index, num_scored=num_scored, memory_budget=memory_budget,
            tail_mass=tail_mass,
        )  # fmt: skip
        active, tokens = tokens.active, tokens._replace(active=None)
        likelihood = None
        if likelihood_targets is not None:
            likelihood = segments.sequence_stats(
                _of_whole(terms, tokens), wide, cu_seqlens, ignore_index=ignore_index
            )
            tokens = only_scored(tokens, targets != ignore_index)
        objective = Objective(
            tokens, targets, cu_seqlens, layout, cu_groups, relevance, desirable, ignore_index,
            user, item_weights, ref_seq_logp, likelihood,
        )  # fmt: skip
        total, found = _total(terms, objective, counts, metrics, state_arguments)
        if metrics and active is not None:
            found["perf/active_share"] = active.double().sum() / objective.scored.sum().clamp(min=1)
    return total.to(stat_dtype(hidden.dtype)), found


def _bound(
    loss: LossLike | Sequence[LossLike],
    loss_weights: Sequence[float] | None,
    loss_args: Mapping[str, Any],
    targets: Tensor,
    token_weights: Tensor | Mapping[str, Tensor] | None,
    num_items: Mapping[str, float | Tensor] | None,
    *,
    stateful: bool,
) -> tuple[list[Term], Tensor | dict[str, Tensor] | None, dict[str, float | Tensor]]:
    """The terms with their arguments, the caller's token weights and denominators, checked."""
    flat_args = {k: _flatten(v, targets.shape) for k, v in loss_args.items()}
    terms = bind_terms(loss, loss_weights, flat_args, stateful=stateful)
    return terms, _user_weights(token_weights, terms, targets), check_num_items(num_items)


def _of_whole(terms: list[Term], tokens: TokenStats) -> TokenStats:
    """The statistics that are summed over likelihood_targets: those of likelihood terms, and what
    else a loss reads there."""
    names = {"logp", *(name for term in terms for name in term.record.whole)} - {"length"}
    return TokenStats(**{name: getattr(tokens, name) for name in names})


def loss_from_stats(
    tokens: TokenStats,  # each field like targets
    targets: Tensor,  # [N] or [B, T]
    cu_seqlens: Tensor | None = None,  # [S+1]
    *,
    loss: LossLike | Sequence[LossLike] = "dpo",
    loss_weights: Sequence[float] | None = None,
    ref_seq_logp: Tensor | None = None,  # [S]
    layout: str = "pairs",
    cu_groups: Tensor | None = None,  # [G+1]
    relevance: Tensor | None = None,  # [S]
    desirable: Tensor | None = None,  # [S] bool
    token_weights: Tensor | Mapping[str, Tensor] | None = None,
    item_weights: Tensor | None = None,
    num_items: Mapping[str, float | Tensor] | None = None,
    metrics: bool = True,
    state_arguments: StateArguments | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    **loss_args: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The second half of `preference_loss`: token statistics in, loss and metrics out.

    For statistics that were cached, came from another op, or were merged over ranks.

    Args:
        tokens: What the ops returned; every statistic the loss reads must be there, and `ref_logp`
            where it has a reference that is not given as `ref_seq_logp`. Ignored positions hold 0.
        targets, and the rest: As in `preference_loss`.

    Returns:
        (loss, metrics): a scalar (fp32; fp64 for fp64 statistics) and detached 0-d tensors.

    Raises:
        ValueError: as `preference_loss`; a statistic that a loss needs is not there.
    """
    checks.check_integer_targets("targets", targets)
    checks.check_ignore_index(ignore_index)
    check_options(layout, metrics, state_arguments)
    cu_seqlens = segments.sequence_boundaries(targets, cu_seqlens)
    check_labels(cu_groups, relevance, desirable, cu_seqlens.numel() - 1)
    terms, user, counts = _bound(
        loss, loss_weights, loss_args, targets, token_weights, num_items,
        stateful=state_arguments is not None,
    )  # fmt: skip
    _check_statistics(terms, tokens, targets, ref_seq_logp, ignore_index)
    with _on(backend):
        objective = Objective(
            tokens, targets, cu_seqlens, layout, cu_groups, relevance, desirable, ignore_index,
            user, item_weights, ref_seq_logp,
        )  # fmt: skip
        total, found = _total(terms, objective, counts, metrics, state_arguments)
    return total.to(stat_dtype(cast(Tensor, tokens.logp).dtype)), found


class PreferenceLoss(nn.Module):
    """`preference_loss` as a stateless module: PreferenceLoss("tdpo2", beta=0.1)(hidden, ...).

    Args:
        loss: As in `preference_loss`.
        **args: Any of its keyword arguments, fixed here; those of a call override them.

    Raises:
        ValueError: an unknown loss, an argument unknown or out of range, when the module is made.
    """

    def __init__(self, loss: LossLike | Sequence[LossLike] = "dpo", **args: Any) -> None:
        super().__init__()
        self.loss, self.args = loss, args
        own = preference_loss.__kwdefaults__ or {}
        of_losses = {k: v for k, v in args.items() if k not in own}
        for record, fixed in check_names(loss, args.get("loss_weights"), of_losses)[0]:
            known = losses.arguments(record)
            given = {k: v for k, v in of_losses.items() if k in known}
            losses.bind(record, {**given, **fixed}, supplied=losses.required(record))

    def forward(self, *tensors: Tensor, **args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return preference_loss(*tensors, loss=self.loss, **{**self.args, **args})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.loss), *(f"{k}={v!r}" for k, v in self.args.items())])


def _total(
    terms: list[Term],
    objective: Objective,
    num_items: dict[str, Any],
    metrics: bool,
    state_arguments: StateArguments | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms, and the metrics of all of them."""
    read = _read(terms)
    total: Tensor | float = 0.0
    found: dict[str, Tensor] = {}
    for i, term in enumerate(terms):
        stage = weight_stage(term, objective)
        seq = objective.sequences(stage, read)
        term = with_state(term, seq, objective, state_arguments)
        value, parts = reduce(term, seq, stage, objective, num_items)
        total = total + term.weight * value
        if len(terms) > 1:
            found[f"loss/{term.record.name}"] = value.detach()
        found |= parts
        if metrics and i == 0:
            found |= term_metrics(term, seq, objective)
    return cast(Tensor, total), found if metrics else {}


def _read(terms: list[Term]) -> frozenset[str]:
    """Statistics that the losses read, whose sums are weighted."""
    return frozenset(
        s.partition(":")[0] for t in terms for s in ("logp", "ref_logp", *t.call.stats)
    )


def _on(backend: str) -> AbstractContextManager[None]:
    """Every op of the block, those inside losses included, on the backend that a caller named."""
    return nullcontext() if backend == "auto" else use_backend(backend)


def _flatten(value: Any, shape: torch.Size) -> Any:
    """Per-token loss arguments may come in the shape of targets; the stages read [N]."""
    if isinstance(value, Tensor) and len(shape) == 2 and value.shape == shape:
        return value.reshape(-1)
    return value


def _user_weights(
    token_weights: Tensor | Mapping[str, Tensor] | None, terms: list[Term], targets: Tensor
) -> Tensor | dict[str, Tensor] | None:
    """The caller's token weights, refused where a loss does not take any."""
    if token_weights is None:
        return None
    coupled = [t.record.name for t in terms if t.record.family == "tokenwise"]
    if coupled:
        raise ValueError(
            f"loss {coupled} is not linear in the tokens, so token_weights have no meaning for it; "
            "mask tokens with ignore_index."
        )
    return checked_weights(token_weights, targets.shape, _read(terms))


def _check_statistics(
    terms: list[Term],
    tokens: TokenStats,
    targets: Tensor,
    ref_seq_logp: Tensor | None,
    ignore_index: int,
) -> None:
    """Refuses statistics that are missing or have another shape than targets, and a reference that
    is no constant, not finite or given twice."""
    if not isinstance(tokens, TokenStats):
        raise ValueError(
            f"tokens must be a prefkern.TokenStats, got {type(tokens).__name__}; build one: "
            "prefkern.TokenStats(logp=...)."
        )
    if tokens.ref_logp is not None and ref_seq_logp is not None:
        raise ValueError(
            "the reference must come in one form, got tokens.ref_logp and ref_seq_logp; pass one."
        )
    for name, value in (("tokens.ref_logp", tokens.ref_logp), ("ref_seq_logp", ref_seq_logp)):
        if value is not None:
            check_reference_values(name, value, targets, ignore_index)
    have = {name for name in tokens._fields if getattr(tokens, name) is not None}
    for term in terms:
        names = {"logp", *(s.partition(":")[0] for s in term.call.stats)}
        if term.call.needs_reference and ref_seq_logp is None:
            names.add("ref_logp")
        if missing := sorted(names - have):
            raise ValueError(
                f"loss {term.record.name!r} needs the token statistics {missing}, and tokens has "
                f"{sorted(have)}; ask the op for them (stats=...)."
            )
    for name in have:
        value = checks.check_float(f"tokens.{name}", getattr(tokens, name))
        if value.shape != targets.shape:
            raise ValueError(
                f"tokens.{name} must have the shape of targets {list(targets.shape)}, got "
                f"{checks.shape_text(value)}."
            )
