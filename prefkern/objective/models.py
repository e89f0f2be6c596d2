"""What an objective needs of the models: which reference serves, and the statistics of every token.

Shapes: N tokens, V vocabulary, D hidden size, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..head import Head
from ..ops.linear_stats import linear_divergence, linear_logps
from ..stats import ONE_MODEL_STATS, TokenStats
from .terms import Term

# Statistics for the metrics alone; without a gradient they add no product.
LOGGED = ("top1", "zmean", "ent")


class Models(NamedTuple):
    """Hidden states and heads of an objective's models, or what is known of the reference."""

    hidden: Tensor  # [N, D] or [B, T, D]
    head: Head
    ref_hidden: Tensor | None  # [N, Dr] or [B, T, Dr]
    ref_head: Head | None
    ref_logp: Tensor | None  # [N] or [B, T]
    ref_seq_logp: Tensor | None  # [S]
    aux_hidden: Tensor | None  # [N, Da] or [B, T, Da]
    aux_head: Head | None
    values: Tensor | tuple[Tensor, Tensor] | None  # [V], or (index, value) each [N, k]


def reference_source(
    models: Models,
    terms: list[Term],
    token_weights: Tensor | Mapping[str, Tensor] | None,
    targets: Tensor,
    ignore_index: int,
) -> str | None:
    """Which reference input serves: "ref_hidden", "ref_logp", "ref_seq_logp" or None.

    Raises:
        ValueError: more than one, one that requires grad or is not finite, or one that cannot give
            what a loss needs.
    """
    given = {name: getattr(models, name) for name in ("ref_hidden", "ref_logp", "ref_seq_logp")}
    present = [name for name, value in given.items() if value is not None]
    if len(present) > 1:
        raise ValueError(f"the reference must come in one form, got {present}; pass one of them.")
    source = present[0] if present else None
    if source is not None:
        tensor = checks.check_tensor(source, given[source])
        checks.check_constant(source, tensor)
        if source != "ref_hidden":
            check_reference_values(source, tensor, targets, ignore_index)
    if models.ref_head is not None and source != "ref_hidden":
        raise ValueError(
            f"ref_head turns ref_hidden into log-probabilities, got {source or 'no reference'}; "
            "pass ref_hidden with it, or drop it."
        )
    wanted = _loss_statistics(terms)
    full = [s for s in wanted if s.partition(":")[0] not in (*ONE_MODEL_STATS, "ref_logp")]
    names = ", ".join(t.record.name for t in terms)
    if full == ["ev"] and not present and "ref_logp" not in wanted and models.values is not None:
        return None
    if full and source != "ref_hidden":
        raise ValueError(
            f"loss {names} needs the reference's whole distribution (statistics {full}), got "
            f"{source or 'no reference'}; pass ref_hidden (and ref_head)."
        )
    if source is None and "ref_logp" in wanted:
        raise ValueError(
            f"loss {names} needs a reference, got none; pass ref_hidden (and ref_head), ref_logp "
            "per token, or ref_seq_logp per sequence."
        )
    if source == "ref_seq_logp":
        stages = [t.record.name for t in terms if _reads_reference_tokens(t)]
        if stages or token_weights is not None:
            who = f"loss {stages}" if stages else "token_weights"
            raise ValueError(
                f"{who} reads log-ratios token by token and needs the reference per token, got "
                "ref_seq_logp; pass ref_logp or ref_hidden."
            )
    return source


def token_statistics(
    models: Models,
    targets: Tensor,  # [N] or [B, T]
    terms: list[Term],
    source: str | None,
    *,
    metrics: bool,
    ignore_index: int,
    num_scored: int | None,
    memory_budget: int | None,
    tail_mass: float,
) -> TokenStats:
    """Asks the ops for what the losses read and, with `metrics`, for what is logged.

    If only ref_logp is wanted of the reference's hidden states, the reference gets a linear_logps
    call of its own under no_grad: the same products as one sweep over both heads, and the budget
    keeps the policy's logits alone.
    """
    wanted = _loss_statistics(terms)
    logged = [name for name in LOGGED if metrics and name not in wanted]
    wanted |= dict.fromkeys(logged)
    own = tuple(s for s in wanted if s.partition(":")[0] in ONE_MODEL_STATS)
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "num_scored": num_scored,
        "memory_budget": memory_budget,
    }
    quiet: dict[str, Any] = {
        "no_grad_stats": (*logged, *_constant_statistics(terms)),
        "tail_mass": tail_mass,
    }
    if len(own) + ("ref_logp" in wanted) < len(wanted):
        if models.ref_hidden is None:  # `ev` of given values reads no reference
            return linear_logps(
                models.hidden, models.head, targets, stats=tuple(wanted), values=models.values,
                **options, **quiet,
            )  # fmt: skip
        return linear_divergence(
            models.hidden, models.head, targets, models.ref_hidden, models.ref_head,
            stats=tuple(wanted), aux_hidden=models.aux_hidden, aux_head=models.aux_head,
            values=models.values, **options, **quiet,
        )  # fmt: skip
    foreign = [k for k in ("aux_hidden", "aux_head", "values") if getattr(models, k) is not None]
    if foreign:
        raise ValueError(
            f"{foreign} serve the statistic 'ev' only, and no loss here reads it; drop them."
        )
    tokens = linear_logps(models.hidden, models.head, targets, stats=own, **options, **quiet)
    if "ref_logp" not in wanted or source == "ref_seq_logp":
        return tokens
    ref_logp = models.ref_logp
    if source == "ref_hidden":
        assert models.ref_hidden is not None
        ref_head = models.head if models.ref_head is None else models.ref_head
        if models.ref_head is not None:
            checks.check_constant("ref_head", ref_head.weight)
        if ref_head.weight.dim() == 2 and not torch.compiler.is_compiling():
            _check_reference(models.ref_hidden, ref_head.weight, targets)
        with torch.no_grad():
            ref_logp = linear_logps(models.ref_hidden, ref_head, targets, **options).logp
    assert ref_logp is not None
    if ref_logp.shape not in (targets.shape, (targets.numel(),)):
        raise ValueError(
            f"ref_logp must have the shape of targets {list(targets.shape)}, got "
            f"{checks.shape_text(ref_logp)}; for sums per sequence use ref_seq_logp."
        )
    ref_logp = ref_logp.reshape(targets.shape)
    scored = targets != ignore_index
    return tokens._replace(ref_logp=torch.where(scored, ref_logp, torch.zeros_like(ref_logp)))


def _check_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Names the reference's tensors where the op, which has one model, would call them hidden."""
    checks.check_float("ref_hidden", hidden)
    rows, width = hidden.shape[:-1], weight.shape[-1]
    if hidden.dim() not in (2, 3) or hidden.shape[-1] != width or rows.numel() != targets.numel():
        raise ValueError(
            f"ref_hidden must be [..., D] with D = {width}, the width of its head, and a row for "
            f"each of the targets {list(targets.shape)}, got {checks.shape_text(hidden)}."
        )


def _loss_statistics(terms: list[Term]) -> dict[str, None]:
    """Token statistics the losses read, in a fixed order; ref_logp follows from a reference."""
    wanted: dict[str, None] = {"logp": None}
    for term in terms:
        wanted |= dict.fromkeys(term.call.stats)
        if term.call.needs_reference:
            wanted["ref_logp"] = None
    return wanted


def _constant_statistics(terms: list[Term]) -> list[str]:
    """Statistics that no loss differentiates: the ops then keep and compute nothing for them."""
    read: dict[str, bool] = {}
    for term in terms:
        for stat in term.call.stats:
            name = stat.partition(":")[0]
            read[name] = read.get(name, True) and name in term.record.constant
    return [name for name, quiet in read.items() if quiet]


def _reads_reference_tokens(term: Term) -> bool:
    tokenwise = term.record.family == "tokenwise" and term.call.needs_reference
    return tokenwise or term.record.weights is not None


def check_reference_values(name: str, value: Tensor, targets: Tensor, ignore_index: int) -> None:
    """Refuses log-probabilities that are no constant floats, and names the first that is not a
    number: cached ones go stale. Reads values on a CPU only, where nobody waits for them."""
    checks.check_constant(name, checks.check_float(name, value))
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
