"""preference_loss: from hidden states to one scalar and the metrics trainers log.

ops (token statistics) -> token weights -> sequence sums -> loss -> reduction. Nothing below knows
which loss is computed; nothing above knows how.

Shapes: N tokens, V vocabulary, D hidden size, S sequences, P pairs, G groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import checks, losses
from ..losses.record import Loss
from ..ops.linear_divergence import linear_divergence
from ..ops.linear_logps import linear_logps
from ..stats import ONE_MODEL_STATS, TokenStats
from . import segments
from .terms import (
    Batch,
    StateArguments,
    Term,
    check_likelihood_targets,
    filled_here,
    only_scored,
    reduce,
    term_metrics,
    weight_stage,
    with_state,
)

# Keywords of preference_loss that belong to the ops (bias, scale, softcap, memory_budget ...).
_PER_CALL = {"hidden", "weight", "targets", "ref_hidden", "ref_weight", "stats"}
OP_OPTIONS = frozenset(inspect.signature(linear_divergence).parameters) - _PER_CALL
_ONE_MODEL_OPTIONS = frozenset(inspect.signature(linear_logps).parameters) - _PER_CALL
_REF_PREFIX = "ref_"


def preference_loss(
    hidden: Tensor,  # [N, D] or [B, T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N] or [B, T]
    cu_seqlens: Tensor | None = None,  # [S+1]
    *,
    loss: str | Loss | Sequence[str | Loss] = "dpo",
    loss_weights: Sequence[float] | None = None,
    ref_hidden: Tensor | None = None,  # [N, Dr] or [B, T, Dr]
    ref_weight: Tensor | None = None,  # [V, Dr]
    ref_logp: Tensor | None = None,  # [N] or [B, T]
    ref_seq_logp: Tensor | None = None,  # [S]
    layout: str = "pairs",
    cu_groups: Tensor | None = None,  # [G+1]
    labels: Tensor | None = None,  # [S]
    token_weights: Tensor | Mapping[str, Tensor] | None = None,
    item_weights: Tensor | None = None,  # [P], [G] or [S]
    num_items: Mapping[str, float | Tensor] | None = None,
    metrics: bool = True,
    likelihood_targets: Tensor | None = None,  # like targets
    state_arguments: StateArguments | None = None,
    **loss_args: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A preference loss of policy hidden states, without [N, V] logits.

    Args:
        hidden, weight, targets: As in `linear_logps`. `[B, T]` input: every row is one sequence.
        cu_seqlens: Boundaries of the packed sequences `[S+1]` int32 on the flattened token axis.
        loss: A name of `prefkern.LOSSES` (or a TRL `loss_type`), a Loss record, or several.
        loss_weights: One factor per loss. Default 1 each.
        ref_hidden, ref_weight: The reference's hidden states for the same tokens and its head
            (None: the policy's). Or
        ref_logp: reference log-probability of each target, like `targets` (nats). Or
        ref_seq_logp: its sum over each sequence `[S]`. At most one of the three.
        layout: How sequences form pairs: "pairs" (chosen, rejected neighbours) or "halves".
        cu_groups: Boundaries of the lists `[G+1]` on the sequence axis, for listwise losses.
        labels: Per sequence `[S]`: bool (desirable) for unpaired losses, relevance (higher is
            better, NaN leaves out) for listwise losses.
        token_weights: One tensor like `targets` for all statistics or a dict statistic -> tensor;
            multiplies the weights a loss brings along. A weight of 0 does not drop a row.
        item_weights: Constant factor of each pair `[P]`, list `[G]` or sequence `[S]` in the sum of
            the loss; denominators still count every item. Losses over sequences or tokens take that
            of their group (`cu_groups` given) or sequence. Default None (1).
        num_items: Denominators "pairs", "groups", "sequences", "tokens" (of likelihood terms) and
            "scored_tokens" (of token means) that replace the batch's own counts (gradient
            accumulation, data parallelism). Default: the batch's counts.
        metrics: Also compute what trainers log. Default True. Their extra statistics are top1 and
            zmean, and the entropy where it adds no product (fp32 or fp64 policy with a trainable
            head, or no gradient wanted).
        likelihood_targets: Labels of the likelihood terms (ORPO's, `sft`) where those score more
            than `targets` does, such as the prompt too; equal to `targets` where that counts.
            Their tokens count as scored for num_scored and in the default denominator. Default
            None, `targets`.
        state_arguments: Called for every loss that keeps a state between batches (bco, beta_dpo,
            lcpo, selfie) with its record, the detached statistics of its rows and its
            hyper-parameters, before the loss; returns the arguments that the state gives, such as
            {"delta": state.mean} after `state = record.update(state, *rows, beta=beta)`. Default
            None: pass them yourself.
        **loss_args: Keywords of `linear_divergence` (bias, scale, softcap, temperature, aux_hidden,
            values, ignore_index, num_scored, memory_budget, backend ...) go to the op; the rest are
            the loss's own (beta, alpha, kl_baseline, aux_logp ...), checked against its signature.

    Returns:
        (loss, metrics): a scalar (fp32; fp64 for fp64 hidden) and a dict of detached 0-d tensors.

    Raises:
        ValueError: an unknown loss or argument (nearest names given), a reference that cannot give
            what the loss needs, layouts and shapes that do not fit, an empty batch.
    """
    op_options = {k: loss_args.pop(k) for k in list(loss_args) if k in OP_OPTIONS}
    ignore_index = op_options.setdefault("ignore_index", -100)
    checks.check_integer_targets("targets", targets)
    cu_seqlens = segments.sequence_boundaries(targets, cu_seqlens)
    flat_args = {k: _flatten(v, targets.shape) for k, v in loss_args.items()}
    terms = _terms(loss, loss_weights, flat_args, stateful=state_arguments is not None)
    wanted = _statistics(terms, metrics, hidden, weight, op_options)
    source = _reference_source(
        terms, wanted, ref_hidden, ref_logp, ref_seq_logp, token_weights, targets, ignore_index,
        op_options.get("values") is not None,
    )  # fmt: skip
    coupled = [t.record.name for t in terms if t.record.family == "tokenwise"]
    if coupled and token_weights is not None:
        raise ValueError(
            f"loss {coupled} is not linear in the tokens, so token_weights have no meaning for it; "
            "mask tokens with ignore_index."
        )

    wide = targets if likelihood_targets is None else likelihood_targets
    check_likelihood_targets(terms, wide, targets, ignore_index)
    tokens = _token_stats(
        hidden, weight, wide, wanted, source, ref_hidden, ref_weight, ref_logp, op_options
    )
    backend = op_options.get("backend", "auto")
    likelihood = None
    if likelihood_targets is not None:
        likelihood = segments.sequence_stats(
            TokenStats(logp=tokens.logp), wide, cu_seqlens, ignore_index=ignore_index,
            backend=backend,
        )  # fmt: skip
        tokens = only_scored(tokens, targets != ignore_index)
    user = dict(token_weights) if isinstance(token_weights, Mapping) else token_weights
    read = frozenset(
        s.partition(":")[0] for t in terms for s in ("logp", "ref_logp", *t.call.stats)
    )
    batch = Batch(
        tokens, targets, cu_seqlens, layout, cu_groups, labels, ignore_index, backend, user,
        item_weights, ref_seq_logp, read, likelihood,
    )  # fmt: skip

    total: Tensor | float = 0.0
    found: dict[str, Tensor] = {}
    for i, term in enumerate(terms):
        stage = weight_stage(term, batch)
        seq = batch.sequences(stage)
        term = with_state(term, seq, batch, state_arguments)
        value, parts = reduce(term, seq, stage, batch, dict(num_items or {}))
        total = total + term.weight * value
        if len(terms) > 1:
            found[f"loss/{term.record.name}"] = value.detach()
        found |= {k: v for k, v in parts.items() if metrics}
        if metrics and i == 0:
            found |= term_metrics(term, seq, batch)
    out_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return cast(Tensor, total).to(out_dtype), found if metrics else {}


class PreferenceLoss(nn.Module):
    """`preference_loss` as a stateless module: PreferenceLoss("tdpo2", beta=0.1)(hidden, ...).

    Args:
        loss: As in `preference_loss`.
        **args: Any of its keyword arguments, fixed here; those of a call override them.
    """

    def __init__(self, loss: str | Loss | Sequence[str | Loss] = "dpo", **args: Any) -> None:
        super().__init__()
        self.loss, self.args = loss, args
        _terms(loss, args.get("loss_weights"), {}, partial=True)

    def forward(self, *tensors: Tensor, **args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return preference_loss(*tensors, loss=self.loss, **{**self.args, **args})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.loss), *(f"{k}={v!r}" for k, v in self.args.items())])


def _flatten(value: Any, shape: torch.Size) -> Any:
    """Per-token loss arguments may come in the shape of targets; the stages read [N]."""
    if isinstance(value, Tensor) and len(shape) == 2 and value.shape == shape:
        return value.reshape(-1)
    return value


def _terms(
    loss: str | Loss | Sequence[str | Loss],
    loss_weights: Sequence[float] | None,
    args: dict[str, Any],
    *,
    partial: bool = False,
    stateful: bool = False,
) -> list[Term]:
    """Resolves names and binds arguments; each argument must serve at least one loss."""
    names = [loss] if isinstance(loss, (str, Loss)) else list(loss)
    if not names:
        raise ValueError("loss must name at least one loss, got an empty list.")
    factors = [1.0] * len(names) if loss_weights is None else [float(w) for w in loss_weights]
    if len(factors) != len(names):
        raise ValueError(
            f"loss_weights must have one number per loss ({len(names)}), got {len(factors)}."
        )
    resolved = [(name, {}) if isinstance(name, Loss) else losses.resolve(name) for name in names]
    if partial:
        return []
    accepted = [losses.arguments(record) for record, _ in resolved]
    if len(resolved) > 1:
        for name in args:
            if not any(name in names for names in accepted):
                raise ValueError(
                    f"no loss of {[r.name for r, _ in resolved]} takes the argument {name!r}; they "
                    f"take {sorted(set().union(*accepted))}."
                )
    terms = []
    for (record, fixed), known, factor in zip(resolved, accepted, factors, strict=True):
        # a single loss refuses what it does not take, with the nearest names
        own = {k: v for k, v in args.items() if len(resolved) == 1 or k in known}
        if record.family == "diffusion":
            raise ValueError(
                f"loss {record.name!r} is of the family 'diffusion' and reads no hidden states; "
                f"call prefkern.losses.{record.name} on prediction errors (prefkern.error_sum)."
            )
        supplied: tuple[str, ...] = ("label", *filled_here(record))
        if stateful and record.update is not None:  # what its state gives comes later
            supplied = (*supplied, *record.extra)
        terms.append(Term(record, losses.bind(record, {**fixed, **own}, supplied=supplied), factor))
    return terms


def _statistics(
    terms: list[Term], metrics: bool, hidden: Tensor, weight: Tensor, op_options: dict[str, Any]
) -> tuple[str, ...]:
    """Token statistics to ask for, in a fixed order; ref_logp follows from needs_reference."""
    wanted: dict[str, None] = {"logp": None}
    for term in terms:
        for name in term.call.stats:
            wanted[name] = None
        if term.call.needs_reference:
            wanted["ref_logp"] = None
    if metrics:
        wanted |= {"top1": None, "zmean": None}
        trains = torch.is_grad_enabled() and hidden.requires_grad
        head_trains = weight.requires_grad or getattr(
            op_options.get("bias"), "requires_grad", False
        )
        if hidden.dtype in (torch.float32, torch.float64) and (head_trains or not trains):
            wanted["ent"] = None
    return tuple(wanted)


def _reference_source(
    terms: list[Term],
    wanted: tuple[str, ...],
    ref_hidden: Tensor | None,
    ref_logp: Tensor | None,
    ref_seq_logp: Tensor | None,
    token_weights: Any,
    targets: Tensor,
    ignore_index: int,
    given_advantage: bool,
) -> str | None:
    """Which reference input serves: "hidden", "logp", "seq_logp" or None."""
    given = {"ref_hidden": ref_hidden, "ref_logp": ref_logp, "ref_seq_logp": ref_seq_logp}
    present = [name for name, value in given.items() if value is not None]
    if len(present) > 1:
        raise ValueError(f"the reference must come in one form, got {present}; pass one of them.")
    for name in present:
        checks.check_tensor(name, given[name])
        checks.check_constant(name, given[name])
    source = present[0].removeprefix(_REF_PREFIX) if present else None
    if present and source != "hidden":
        _check_finite(present[0], cast(Tensor, given[present[0]]), targets, ignore_index)
    full = [s for s in wanted if s.partition(":")[0] not in (*ONE_MODEL_STATS, "ref_logp")]
    names = ", ".join(t.record.name for t in terms)
    if full == ["ev"] and source is None and "ref_logp" not in wanted and given_advantage:
        return None
    if full and source != "hidden":
        raise ValueError(
            f"loss {names} needs the reference's whole distribution (statistics {full}), got "
            f"{present[0] if present else 'no reference'}; pass ref_hidden (and ref_weight)."
        )
    if source is None and "ref_logp" in wanted:
        raise ValueError(
            f"loss {names} needs a reference, got none; pass ref_hidden (and ref_weight), ref_logp "
            "per token, or ref_seq_logp per sequence."
        )
    if source == "seq_logp":
        stages = [
            t.record.name
            for t in terms
            if t.record.weights is not None
            or (t.record.family == "tokenwise" and t.call.needs_reference)
        ]
        if stages or token_weights is not None:
            who = f"loss {stages}" if stages else "token_weights"
            raise ValueError(
                f"{who} reads log-ratios token by token and needs the reference per token, got "
                "ref_seq_logp; pass ref_logp or ref_hidden."
            )
    return source


def _check_finite(name: str, value: Tensor, targets: Tensor, ignore_index: int) -> None:
    """Cached reference values go stale: names the first row that is not a number. CPU only, since
    reading values would synchronise a GPU."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ~torch.isfinite(value)
    if value.shape == targets.shape:
        bad &= targets != ignore_index
    if bool(bad.any()):
        row = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must be finite, got {value[tuple(row)].item()} at {row}; recompute the cached "
            "reference log-probabilities (`prefkern precompute`)."
        )


def _token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    wanted: tuple[str, ...],
    source: str | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_logp: Tensor | None,
    op_options: dict[str, Any],
) -> TokenStats:
    """Asks the ops for the wanted statistics.

    A reference that only gives ref_logp is read by linear_logps without gradient: same products as
    one sweep over both heads, and the budget keeps the policy's logits alone.
    """
    own = tuple(s for s in wanted if s.partition(":")[0] in ONE_MODEL_STATS)
    if len(own) + ("ref_logp" in wanted) < len(wanted):
        if ref_hidden is None:
            # `ev` of given values reads no reference: a uniform one of width 1 stands in, 2 N V
            # operations instead of 2 N V D.
            ref_hidden = hidden.new_zeros(*targets.shape, 1)
            ref_weight = weight.new_zeros(weight.shape[0], 1)
        return linear_divergence(
            hidden, weight, targets, ref_hidden, ref_weight, stats=wanted, **op_options
        )
    foreign = [k for k in ("aux_hidden", "aux_weight", "values") if op_options.get(k) is not None]
    if foreign:
        raise ValueError(
            f"{foreign} serve the statistic 'ev' only, and no loss here reads it; drop them."
        )
    policy_options = {k: v for k, v in op_options.items() if k in _ONE_MODEL_OPTIONS}
    tokens = linear_logps(hidden, weight, targets, stats=own, **policy_options)
    if "ref_logp" not in wanted or source == "seq_logp":
        return tokens
    if source == "hidden":
        own_options = {
            name: value
            for name in ("scale", "softcap", "temperature", "bias")
            if (value := op_options.get(_REF_PREFIX + name)) is not None
        }
        same_head = ref_weight is None
        head_weight = weight if ref_weight is None else ref_weight
        assert ref_hidden is not None
        checks.check_constant("ref_weight", ref_weight)
        if not same_head:  # a bias belongs to its head
            policy_options.pop("bias", None)
        ref_options: dict[str, Any] = {**policy_options, **own_options}
        with torch.no_grad():
            ref_logp = linear_logps(ref_hidden, head_weight, targets, **ref_options).logp
    elif ref_logp is not None and ref_logp.numel() != targets.numel():
        raise ValueError(
            f"ref_logp must have the shape of targets {list(targets.shape)}, got "
            f"{checks.shape_text(ref_logp)}; for sums per sequence use ref_seq_logp."
        )
    scored = targets != op_options["ignore_index"]
    assert ref_logp is not None
    ref_logp = ref_logp.reshape(targets.shape)
    return tokens._replace(ref_logp=torch.where(scored, ref_logp, torch.zeros_like(ref_logp)))
