"""One loss of an objective: token weights, sequence sums, the loss, its denominator, its metrics.

Shapes: N tokens, S sequences, P pairs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import checks, losses
from ..losses.binding import LossLike
from ..losses.record import Loss, TokenWeights
from ..ops import ragged
from ..ops.segment_sum import segment_sum
from ..stats import SeqStats, TokenStats
from . import segments
from .given import factors_of
from .metrics import list_metrics, pair_metrics, sequence_metrics, unpaired_metrics


class Term(NamedTuple):
    """One loss of the objective with its arguments."""

    record: Loss
    call: losses.Bound
    weight: float


# (record, detached statistics of its rows, hyper-parameters) -> arguments from the loss's state.
StateArguments = Callable[[Loss, list[SeqStats], Mapping[str, Any]], Mapping[str, Any]]


# Tensors of a tokenwise loss that come from the objective.
_FROM_BATCH = ("scored", "cu_groups")


def bind_terms(
    loss: LossLike | Sequence[LossLike],
    loss_weights: Sequence[float] | None,
    args: Mapping[str, Any],
    *,
    stateful: bool = False,
) -> list[Term]:
    """Resolves names and binds arguments; each argument must serve at least one loss.

    `stateful`: the states of losses that keep one give their arguments later.

    Raises:
        ValueError: an unknown loss or argument, a missing argument, weights that do not fit.
    """
    resolved, factors = check_names(loss, loss_weights, args)
    terms = []
    for (record, fixed), factor in zip(resolved, factors, strict=True):
        # a single loss refuses what it does not take, with the nearest names
        known = losses.arguments(record)
        own = {k: v for k, v in args.items() if len(resolved) == 1 or k in known}
        if record.family == "diffusion":
            raise ValueError(
                f"loss {record.name!r} is of the family 'diffusion' and reads no hidden states; "
                f"call prefkern.losses.{record.name} on prediction errors (prefkern.error_sum)."
            )
        supplied: tuple[str, ...] = ("desirable", *filled_here(record))
        if stateful and record.update is not None:  # what its state gives comes later
            supplied = (*supplied, *record.extra)
        terms.append(Term(record, losses.bind(record, {**own, **fixed}, supplied=supplied), factor))
    return terms


def check_names(
    loss: LossLike | Sequence[LossLike],
    loss_weights: Sequence[float] | None,
    args: Iterable[str],
) -> tuple[list[tuple[Loss, dict[str, Any]]], list[float]]:
    """(loss, the arguments its alias fixes) and the factor of every loss.

    Raises:
        ValueError: an unknown loss, an argument that no loss takes, weights that do not fit.
    """
    several = isinstance(loss, Sequence) and not isinstance(loss, str)
    names = list(cast(Sequence[LossLike], loss)) if several else [cast(LossLike, loss)]
    if not names:
        raise ValueError(f"loss must be a name of prefkern.LOSSES or a list of them, got {loss!r}.")
    factors = factors_of(loss_weights, len(names))
    resolved = [losses.resolve(name) for name in names]
    losses.check_arguments([record for record, _ in resolved], args)
    return resolved, factors


def filled_here(record: Loss) -> tuple[str, ...]:
    """Extra tensors of a loss that are filled here: fields of SeqStats, parts of the objective."""
    known = _FROM_BATCH if record.family == "tokenwise" else SeqStats._fields
    return tuple(name for name in record.extra if name in known)


class Objective(NamedTuple):
    """What every term of an objective reads."""

    tokens: TokenStats
    targets: Tensor
    cu_seqlens: Tensor  # [S+1]
    layout: str
    cu_groups: Tensor | None
    relevance: Tensor | None  # [S]
    desirable: Tensor | None  # [S] bool
    ignore_index: int
    user_weights: Tensor | dict[str, Tensor] | None
    item_weights: Tensor | None  # [P], [G] or [S]
    ref_seq_logp: Tensor | None
    likelihood: SeqStats | None = None  # over likelihood_targets, where given

    @property
    def scored(self) -> Tensor:  # [N] bool
        return (self.targets != self.ignore_index).reshape(-1)

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    def sequences(self, stage: TokenWeights | None, read: frozenset[str]) -> SeqStats:
        """SeqStats under a stage's weights times the caller's; what is only logged, and not `read`
        by a loss, is not weighted."""
        here = (f for f in self.tokens._fields if getattr(self.tokens, f) is not None)
        weighted = tuple(f for f in here if f in read)
        weights = segments.combine_weights(stage, self.user_weights, weighted)
        seq = segments.sequence_stats(
            self.tokens, self.targets, self.cu_seqlens, token_weights=weights,
            ignore_index=self.ignore_index,
        )  # fmt: skip
        if self.ref_seq_logp is not None:
            if tuple(self.ref_seq_logp.shape) != (self.num_sequences,):
                raise ValueError(
                    f"ref_seq_logp must be [S] = [{self.num_sequences}], one sum per sequence, got "
                    f"{checks.shape_text(self.ref_seq_logp)}; for values per token use ref_logp."
                )
            if self.ref_seq_logp.dtype == torch.float32 and seq.logp is not None:
                # a cache of rounded sums: equal models must give a log-ratio of exactly 0
                seq = seq._replace(logp=seq.logp.to(torch.float32).to(torch.float64))
            seq = seq._replace(ref_logp=self.ref_seq_logp.to(torch.float64))
        return seq


def weight_stage(term: Term, objective: Objective) -> TokenWeights | None:
    """Runs the loss's token-weight stage with the inputs it names."""
    stage, rows = term.record.weights, term.record.rows
    if stage is None:
        return None

    def sign() -> Tensor:  # [N]
        role = segments.role_of_sequence(
            objective.num_sequences, len(rows), objective.layout, objective.targets.device
        )
        per_sequence = 1 - 2 * role.clamp(max=1)
        return ragged.spread(per_sequence, objective.cu_seqlens, objective.targets.numel())

    def public_length() -> Tensor:  # [S]
        length = segment_sum(objective.scored.float(), objective.cu_seqlens).long()
        split = segments.split_rows(SeqStats(length=length), len(rows), objective.layout, rows)
        shortest = torch.stack([seq.require("length") for seq in split]).amin(0)  # [P]
        neighbours = objective.layout == "pairs"
        return shortest.repeat_interleave(len(rows)) if neighbours else shortest.repeat(len(rows))

    makers = {
        "cu_seqlens": lambda: objective.cu_seqlens,
        "scored": lambda: objective.scored,
        "ref_logp": lambda: cast(Tensor, objective.tokens.ref_logp).reshape(-1).detach(),
        "logp": lambda: cast(Tensor, objective.tokens.logp).reshape(-1).detach(),
        "sign": sign,
        "public_length": public_length,
    }
    given = {name: make() for name, make in makers.items() if name in term.record.inputs.stage}
    try:
        return stage(**given, **term.call.stage)
    except ValueError as error:
        raise ValueError(f"loss {term.record.name!r}: {error}") from error


def with_state(term: Term, seq: SeqStats, objective: Objective, ask: StateArguments | None) -> Term:
    """The term with the arguments that the state of its loss gives, where it has one."""
    if term.record.update is None or ask is None:
        return term
    rows = _split(term, seq, objective) if term.record.family == "pairwise" else [seq]
    found = ask(term.record, [row.map(Tensor.detach) for row in rows], term.call.hyper)
    return term._replace(call=term.call._replace(args={**term.call.args, **found}))


def reduce(
    term: Term,
    seq: SeqStats,
    stage: TokenWeights | None,
    objective: Objective,
    num_items: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over its denominator, plus the stage's penalty and the likelihood term."""
    record, call = term.record, term.call
    filled = {
        name: _fill(name, record, seq, objective)
        for name in filled_here(record)
        if name not in call.args
    }
    args = {**call.args, **filled}
    parts: dict[str, Tensor] = {}
    if record.family == "pairwise":
        values = record(*_split(term, seq, objective), **args)
    elif record.family == "pointwise":
        if "desirable" in record.extra:
            args["desirable"] = _per_sequence("desirable", record, objective)
        values = record(seq, **args)
    elif record.family == "listwise":
        relevance = _per_sequence("relevance", record, objective)
        scores = getattr(seq, record.score)
        values = record(scores, relevance, _groups(record, objective), **args)
    else:  # tokenwise
        values = record(objective.tokens.map(torch.flatten), objective.cu_seqlens, **args)
    count = num_items.get(record.items)
    if count is None:
        scored = record.items == "scored_tokens"
        count = objective.scored.sum().clamp(min=1) if scored else values.numel()
    value = _weighted(values, objective).sum() / count
    if stage is not None and stage.penalty is not None:
        penalty = stage.penalty.sum() / count
        parts["penalty"] = penalty.detach()
        value = value + penalty
    if call.supervised:
        nll = _likelihood(term, seq, objective, num_items, count)
        parts["nll_loss"] = nll.detach()
        value = value + call.supervised * nll
    return value, parts


def _weighted(values: Tensor, objective: Objective) -> Tensor:
    """values [items] times the caller's weight of each; a weight of 0 hides any value.

    A loss over sequences or tokens takes the weight of their group, or of their sequence.
    """
    weights, cu = objective.item_weights, objective.cu_groups
    if weights is None:
        return values
    checks.check_tensor("item_weights", weights)
    if weights.is_complex():
        raise ValueError(f"item_weights must be real numbers, got {weights.dtype}.")
    fits = weights.shape == values.shape
    if not fits and cu is not None and weights.numel() == cu.numel() - 1:
        weights = ragged.spread(weights, cu, objective.num_sequences)
    if weights.numel() == objective.num_sequences and values.numel() == objective.targets.numel():
        weights = ragged.spread(weights, objective.cu_seqlens, values.numel())
    if weights.shape != values.shape:
        raise ValueError(
            f"item_weights must be {list(values.shape)}, one per pair, list or sequence, got "
            f"{checks.shape_text(weights)}."
        )
    weights = weights.detach().to(values.dtype)
    return torch.where(weights == 0, torch.zeros_like(values), weights * values)


def _likelihood(
    term: Term, seq: SeqStats, objective: Objective, num_items: dict[str, Any], count: Any
) -> Tensor:
    """Negative log-likelihood of the rows a loss names, with its own denominator."""
    spec = term.record.supervised
    assert spec is not None
    rows = _split(term, seq if objective.likelihood is None else objective.likelihood, objective)
    row = rows[term.record.rows.index(spec.rows)]
    if spec.mode == "token":
        return -row.require("logp").sum() / num_items.get(
            "tokens", row.require("length").sum().clamp(min=1)
        )
    per_sequence = row.mean_logp if spec.mode == "seq" else row.require("logp")
    return -per_sequence.sum() / count


def check_likelihood_targets(
    terms: list[Term], wide: Tensor, targets: Tensor, ignore_index: int
) -> None:
    """Refuses likelihood targets that no term reads or that leave out what `targets` scores."""
    if wide is targets:
        return
    checks.check_integer_targets("likelihood_targets", wide)
    if not any(t.record.supervised is not None or t.record.whole for t in terms):
        names = ", ".join(t.record.name for t in terms)
        plain = " or ".join(repr(name) for name, record in losses.LOSSES.items() if record.alone)
        raise ValueError(
            f"likelihood_targets serve likelihood terms, and loss {names} has none; add {plain}."
        )
    if wide.shape != targets.shape:
        raise ValueError(
            f"likelihood_targets must have the shape of targets {list(targets.shape)}, got "
            f"{checks.shape_text(wide)}."
        )
    # values are read on the CPU only: elsewhere that would wait for the device
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (targets != ignore_index) & (wide != targets)
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            raise ValueError(
                f"likelihood_targets must equal targets where those are scored, got "
                f"{wide[tuple(where)].item()} for {targets[tuple(where)].item()} at {where}."
            )


def only_scored(tokens: TokenStats, scored: Tensor) -> TokenStats:
    """The statistics of scored tokens, exactly 0 (and without gradient) elsewhere."""
    return tokens.map(lambda field: torch.where(scored, field, 0.0))


def _fill(name: str, record: Loss, seq: SeqStats, objective: Objective) -> Tensor:
    if name in SeqStats._fields:
        wide = objective.likelihood if name in record.whole else None
        return (seq if wide is None else wide).require(name)
    return objective.scored if name == "scored" else _groups(record, objective)


def _split(term: Term, seq: SeqStats, objective: Objective) -> list[SeqStats]:
    if _single(term, objective):  # the other rows are there for their shape
        return [seq] * len(term.record.rows)
    return segments.split_rows(seq, len(term.record.rows), objective.layout, term.record.rows)


def _single(term: Term, objective: Objective) -> bool:
    """Whether every sequence is the one answer of its group that the loss reads."""
    return term.record.alone and objective.layout == "unpaired"


def _per_sequence(name: str, record: Loss, objective: Objective) -> Tensor:
    """`relevance` or `desirable` [S] of the batch, which given.check_labels has checked."""
    value = getattr(objective, name)
    if value is None:
        example = "a bool" if name == "desirable" else "a number, higher is better,"
        raise ValueError(
            f"loss {record.name!r} needs {name} [S] = [{objective.num_sequences}], {example} per "
            "sequence, got none."
        )
    return value


def _groups(record: Loss, objective: Objective) -> Tensor:
    if objective.cu_groups is None:
        raise ValueError(
            f"loss {record.name!r} ranks lists and needs cu_groups [G+1] on the sequence axis, "
            "got none."
        )
    return checks.check_cu_seqlens(
        objective.cu_groups, objective.num_sequences, name="cu_groups", of="sequences"
    )


def term_metrics(term: Term, seq: SeqStats, objective: Objective) -> dict[str, Tensor]:
    """What trainers log for the first loss of the objective."""
    record, call = term.record, term.call
    fn = record.rewards
    rewards = None if fn is None else lambda s: fn(s, **call.hyper)
    seq = seq.map(Tensor.detach)
    if record.family == "pairwise" and not _single(term, objective):
        chosen, rejected = _split(term, seq, objective)[:2]
        return pair_metrics(chosen, rejected, rewards, record.score)
    if record.family == "pointwise" and "desirable" in record.extra:
        return unpaired_metrics(seq, _per_sequence("desirable", record, objective), rewards)
    if record.family == "listwise":
        scores = getattr(seq, record.score)
        relevance = _per_sequence("relevance", record, objective)
        return list_metrics(seq, scores, relevance, _groups(record, objective), rewards)
    return sequence_metrics(seq, rewards)
