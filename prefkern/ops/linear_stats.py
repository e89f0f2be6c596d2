"""linear_logps and linear_divergence: token statistics from hidden states and heads.

Shapes: N tokens, V vocabulary, D hidden size of the policy, Dr of the reference, n statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends.contract import SHORT, HeadCall, Model
from ..backends.plan import NO_PLAN, read_plan, write_plan
from ..head import Head, HeadLike, as_head
from ..stats import (
    FROZEN_STATS,
    NO_GRADIENT,
    ONE_MODEL_STATS,
    TAIL_STATS,
    TWO_MODEL_STATS,
    Stat,
    TokenStats,
    parse_stats,
)
from . import budget, sharded, shared, tail
from .head_op import head_op
from .scored import scored_rows

Values = Tensor | tuple[Tensor, Tensor]


def linear_logps(
    hidden: Tensor,  # [N, D] or [B, T, D]
    head: HeadLike,  # [V, D]
    targets: Tensor,  # [N] or [B, T] int64
    *,
    ignore_index: int = -100,
    stats: str | Sequence[str] = ("logp",),
    values: Values | None = None,  # [V], or (index, value) each [N, k]
    no_grad_stats: Sequence[str] = (),
    num_scored: int | None = None,
    memory_budget: int | None = None,
    tail_mass: float = 0.0,
    backend: str = "auto",
) -> TokenStats:
    """Per-token statistics of softmax(z) without holding the [N, V] logits.

    z = softcap * tanh(scale * (hidden @ weight.T + low rank + bias) / softcap) / temperature

    Args:
        hidden: Last hidden states `[N, D]` or `[B, T, D]`; fp32, bf16, fp16 or fp64. Under autocast
            the product runs in the autocast dtype. A product beyond fp16's 65504 makes the gradient
            of its row NaN: use bf16 there.
        head: Weight `[V, D]`, an nn.Linear, or a `Head` with bias, scale, soft cap, temperature and
            low-rank terms.
        targets: Labels already shifted, in [0, V) or `ignore_index`. Ignored rows cost nothing,
            give exactly 0 and no gradient, whatever their hidden state holds.
        ignore_index: Label of rows to leave out. Default -100.
        stats: Names among logp, lse, zy, ent, col, top1, zmean, xent, ev (`TokenStats`). Default
            ("logp",).
        values: For `ev`, A: one number per vocabulary entry `[V]`, or the non-zero entries of each
            row as a pair (index, value) of `[N, k]` tensors. For `xent`, the teacher: a pair
            (index, probability). A constant; an entry listed twice adds up.
        no_grad_stats: Names among `stats` that are only reported: they get no gradient, and a
            frozen head keeps nothing for them. Default none.
        num_scored: Number of rows that are not ignored, where the host must know it: on a GPU, None
            costs one synchronisation (and no compaction under tracing or graph capture). A wrong
            number is an error on a CPU and makes every result NaN on a GPU. Default None.
        memory_budget: Bytes of logits kept for the backward; 0 recomputes them. Changes time, not
            one bit of a result. Default: a constant of the device, whatever is free: 512 MiB on a
            CPU; 8 GiB on a GPU of 140 GB, 4 GiB of 80 GB, 1 GiB of less; 256 MiB elsewhere
            (`prefkern.backends.memory`).
        tail_mass: Probability mass e in [0, 1] of every row whose gradient may be left out: of the
            chunks of 1,024 vocabulary columns, those of smallest mass that add up to at most e are
            skipped by the backward, never the target's. A row of dlogp/dz then lacks at most e in
            L1; the head's rows share the mass of their skipped chunks evenly. Applies where only
            logp, lse, zy, xent and fkl (2 e) have a gradient; values are exact always. The share
            computed comes back as the field `active`: 1 also where a frozen head, by a sample, is
            faster without (on a CPU, from 1,024 rows on). Default 0: nothing is skipped.
        backend: "auto" or a name from `prefkern.backends.choice.backend_names()`.

    Returns:
        TokenStats; each requested field has the shape of `targets`, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes, dtypes, devices, labels or names that cannot be; an explicit backend
            that cannot serve the call.

    Gradients reach hidden, weight, bias and the low-rank terms; top1 and zmean have none. Double
    backward is refused. Source: formulas of the log-softmax; recompute scheme of Wijmans et al.
    2024 (Cut Your Losses).
    """
    checks.check_integer_targets("targets", targets)
    checks.check_float("hidden", hidden)
    call = _Call(
        "linear_logps", [(hidden, as_head(head))], targets, ignore_index,
        parse_stats(stats, allowed=(*ONE_MODEL_STATS, "ev")), no_grad_stats, num_scored,
        memory_budget, tail_mass, backend,
    )  # fmt: skip
    return _statistics(call, values, aux=False)


def linear_divergence(
    hidden: Tensor,  # [N, D] or [B, T, D]
    head: HeadLike,  # [V, D]
    targets: Tensor,  # [N] or [B, T] int64
    ref_hidden: Tensor,  # [N, Dr] or [B, T, Dr]
    ref_head: HeadLike | None = None,  # [V, Dr]
    *,
    aux_hidden: Tensor | None = None,  # [N, Da] or [B, T, Da]
    aux_head: HeadLike | None = None,  # [V, Da]
    values: Values | None = None,  # [V], or (index, value) each [N, k]
    ignore_index: int = -100,
    stats: str | Sequence[str] = ("logp", "ref_logp", "fkl"),
    no_grad_stats: Sequence[str] = (),
    num_scored: int | None = None,
    memory_budget: int | None = None,
    tail_mass: float = 0.0,
    backend: str = "auto",
) -> TokenStats:
    """Per-token statistics of the policy p and the reference r without holding [N, V] logits.

    p = softmax(z), r = softmax(z_ref); z as in `linear_logps`. The reference is a constant.

    In a 16-bit dtype, a call with a gradient of any statistic but logp, lse, zy and xent keeps
    or recomputes fp32 products, twice the bytes: of rounded ones, the gradient of a divergence
    would be a tenth off.

    Args:
        hidden, head, targets, ignore_index: As in `linear_logps`.
        ref_hidden: Hidden states of the reference for the same tokens `[N, Dr]` or `[B, T, Dr]`.
        ref_head: Head of the reference, with its own bias, scale, soft cap and temperature. Default
            None: the policy's head, read as a constant (its low-rank terms belong to the policy's
            hidden states and must then be given with `ref_head`).
        aux_hidden, aux_head: A third head for the statistic `ev`:
            A_v = log softmax(aux)_v - log r_v, formed in the tile.
        values: A for `ev`, or the teacher of `xent`, as in `linear_logps`.
        stats: Any of `linear_logps`' names and ref_logp, ref_lse, fkl = KL(r||p), rkl = KL(p||r),
            "jsd:b", "alpha:a", "renyi:a", tv, "bkl:k", "mix:b". One parameter per field and call.
            Default ("logp", "ref_logp", "fkl"). bkl is inf where the rest's mass underflows.
        no_grad_stats, num_scored, memory_budget, tail_mass, backend: As in `linear_logps`.

    Returns:
        TokenStats; each requested field has the shape of `targets`, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: as `linear_logps`; a reference, aux or values input that requires grad; `ev`
            without exactly one source of A; a dense [N, V] `values`.

    Source: TDPO (Zeng et al. 2024) for fkl; GKD (Agarwal et al. 2024) for jsd; ADPA for ev.
    """
    checks.check_integer_targets("targets", targets)
    checks.check_float("hidden", hidden)
    policy = as_head(head)
    models = [(hidden, policy), (ref_hidden, _reference_head(policy, ref_head))]
    aux = aux_hidden is not None
    if aux != (aux_head is not None):
        raise ValueError(
            "aux_hidden and aux_head must be given together, got only one; pass both or none."
        )
    if aux_hidden is not None and aux_head is not None:
        models.append((aux_hidden, as_head(aux_head, "aux_head")))
    call = _Call(
        "linear_divergence", models, targets, ignore_index,
        parse_stats(stats, allowed=ONE_MODEL_STATS + TWO_MODEL_STATS), no_grad_stats, num_scored,
        memory_budget, tail_mass, backend,
    )  # fmt: skip
    return _statistics(call, values, aux=aux)


class _Call(NamedTuple):
    """The arguments that both ops share."""

    op: str
    models: list[tuple[Tensor, Head]]  # hidden [..., D] and head of policy, reference, third head
    targets: Tensor
    ignore_index: int
    stats: tuple[Stat, ...]
    no_grad: Sequence[str]
    num_scored: int | None
    memory_budget: int | None
    tail_mass: float
    backend: str


def _reference_head(policy: Head, ref_head: HeadLike | None) -> Head:
    if ref_head is not None:
        return as_head(ref_head, "ref_head")
    if policy.low_rank:
        raise ValueError(
            "ref_head must be given where head has low-rank terms, got None; their left factors "
            "belong to the policy's hidden states: pass Head(weight, ...) without them for a "
            "reference without the adapter."
        )
    return policy.detach()


def _statistics(call: _Call, values: Values | None, *, aux: bool) -> TokenStats:
    """Checks the arguments, makes the record and runs the op."""
    targets, (hidden, head) = call.targets, call.models[0]
    place = None
    if any(h.shard is not None for _, h in call.models):
        place, heads = sharded.locate([h for _, h in call.models])
        call = call._replace(models=[(x, h) for (x, _), h in zip(call.models, heads, strict=True)])
        hidden, head = call.models[0]
    checks.check_ignore_index(call.ignore_index)
    _check_models(call)
    budget.check_budget(call.memory_budget)
    tail.check_tail_mass(call.tail_mass)
    quiet = _check_no_grad(call)
    total = head.weight.shape[0] if place is None else place.total
    data, index = _check_values(targets, total, values)
    _check_sources(call.stats, data, index, aux=aux)

    dtype = shared.compute_dtype(hidden)
    n, v = targets.numel(), head.weight.shape[0]
    names = ",".join(map(str, call.stats))
    chosen = shared.choose_backend(
        call.op, hidden.device, dtype, head.weight.dtype, names, call.backend,
        shared.shape_for_message(n, v, head.weight.shape[1]),
    )  # fmt: skip
    flat = targets.reshape(-1).long().contiguous()
    checks.check_count("num_scored", call.num_scored)
    rows = None
    if not shared.compacts(chosen) and (place is None or place.tokens == "same"):
        rows = scored_rows(flat, call.ignore_index, call.num_scored)
    models = [_model(h, w, dtype) for h, w in call.models]
    record = HeadCall(
        models[0], models[1] if len(models) > 1 else None, models[2] if len(models) > 2 else None,
        flat, rows, data, index, call.ignore_index, NO_PLAN,
    )  # fmt: skip
    skips, still = _tail(call, quiet), _frozen(call, quiet)
    plan = write_plan(
        call.stats, quiet, record.present(), short=dtype in SHORT,
        frozen=still and skips == 0.0, tail=skips, shard=place,
        either=still and place is None and shared.picks_scheme(chosen),
    )  # fmt: skip
    record = record._replace(plan=read_plan(plan))
    out = head_op(record, plan, _kept(call, record, chosen), call.num_scored, chosen)
    active = None
    if record.plan.tail > 0.0:
        out, active = out[:-1], out[-1].detach().reshape(targets.shape)
    elif call.tail_mass > 0.0 and _trains(call):
        active = (targets != call.ignore_index).to(out.dtype)
    return shared.to_token_stats(out, call.stats, quiet, targets.shape)._replace(active=active)


def _model(hidden: Tensor, head: Head, dtype: torch.dtype) -> Model:
    """Contiguous operands; several low-rank terms become one, their ranks side by side."""
    low_in = low_out = None
    if head.low_rank:
        left = [shared.rows_of(u, dtype) for u, _ in head.low_rank]
        right = [b for _, b in head.low_rank]
        low_in = left[0] if len(left) == 1 else torch.cat(left, 1)
        low_out = (right[0] if len(right) == 1 else torch.cat(right, 1)).contiguous()
    bias = None if head.bias is None else head.bias.contiguous()
    return Model(
        shared.rows_of(hidden, dtype), head.weight.contiguous(), bias, low_in, low_out, None,
        float(head.scale), 0.0 if head.softcap is None else float(head.softcap),
        float(head.temperature),
    )  # fmt: skip


def _moves(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _trains(call: _Call) -> bool:
    hidden, head = call.models[0]
    terms = [t for pair in head.low_rank for t in pair]
    return _moves(hidden, head.weight, head.bias, *terms)


def _tail(call: _Call, quiet: frozenset[str]) -> float:
    """The mass that a backward may skip: 0 where there is none, or where a statistic without a
    bound has a gradient, which needs every unit."""
    moving = {s.name for s in call.stats} - quiet - NO_GRADIENT
    return float(call.tail_mass) if _trains(call) and moving and moving <= TAIL_STATS else 0.0


def _frozen(call: _Call, quiet: frozenset[str]) -> bool:
    """True when no gradient reaches the head and every statistic's logit gradient can be folded to
    one [N, D] row in the forward (2 products instead of 3 or 4); with a tail the op may do so."""
    hidden, head = call.models[0]
    left, right = [u for u, _ in head.low_rank], [b for _, b in head.low_rank]
    moving = {s.name for s in call.stats} - quiet - NO_GRADIENT
    return (
        _moves(hidden, *left)
        and not _moves(head.weight, head.bias, *right)
        and set() < moving <= FROZEN_STATS
    )


def _kept(call: _Call, record: HeadCall, backend: str) -> int:
    """Rows of logits that the forward keeps for the backward."""
    if record.plan.frozen or not _trains(call):
        return 0
    if record.plan.tail > 0.0 and not shared.keeps_units(backend):
        return 0
    scored = record.M
    if record.shard is not None and record.shard.tokens != "same":
        scored = budget.count_of_all(record.targets, record.shard.world)
    elif record.rows is None:
        scored = budget.count_scored(record.targets, call.ignore_index, call.num_scored)
    bytes_per_logit = record.kept_models * record.cache_dtype.itemsize
    device = record.targets.device
    return budget.rows_kept(scored, record.V, bytes_per_logit, call.memory_budget, device)


# ---- checks --------------------------------------------------------------------------------------


def _check_models(call: _Call) -> None:
    hidden, head = call.models[0]
    for prefix, (h, w) in zip(("", "ref_", "aux_"), call.models, strict=False):
        part = w.shard is not None
        checks.check_head(h, w.weight, call.targets, w.bias, prefix=prefix, part=part)
        _check_low_rank(prefix, h, w)
        if not prefix:
            continue
        if w.weight.shape[0] != head.weight.shape[0]:
            raise ValueError(
                f"{prefix}head must have the policy's vocabulary V = {head.weight.shape[0]}, got "
                f"{checks.shape_text(w.weight)}; pad the smaller head and mark the padding with a "
                "bias of -inf."
            )
        checks.check_same_device(f"{prefix}hidden", h, "hidden", hidden)
        constants: list[tuple[str, Tensor | None]] = [(f"{prefix}hidden", h)]
        constants += [(f"{prefix}head: weight", w.weight), (f"{prefix}head: bias", w.bias)]
        constants += [(f"{prefix}head: low_rank", t) for pair in w.low_rank for t in pair]
        for name, tensor in constants:
            checks.check_constant(name, tensor)


def _check_low_rank(prefix: str, hidden: Tensor, head: Head) -> None:
    for u, b in head.low_rank:
        lead, v = list(hidden.shape[:-1]), head.weight.shape[0]
        if list(u.shape[:-1]) != lead or b.shape != (v, u.shape[-1]) or u.shape[-1] == 0:
            raise ValueError(
                f"{prefix}head: low_rank must hold pairs (u {lead} + [r], B [V, r]) with V = {v} "
                f"and r > 0, got {checks.shape_text(u)} and {checks.shape_text(b)}."
            )
        for tensor in (u, b):
            checks.check_same_device(f"{prefix}head: low_rank", tensor, "hidden", hidden)


def _check_no_grad(call: _Call) -> frozenset[str]:
    """Statistics without a gradient: all where no backward can follow, which spares the fold."""
    names = {s.name for s in call.stats}
    given = [call.no_grad] if isinstance(call.no_grad, str) else call.no_grad
    listed = isinstance(given, (tuple, list, set, frozenset))
    quiet = {str(name).partition(":")[0] for name in (given if listed else [given])}
    if got := sorted(quiet - names):
        raise ValueError(f"no_grad_stats must be among the call's {sorted(names)}, got {got}.")
    return frozenset(quiet if _trains(call) else names)


def _check_values(
    targets: Tensor, vocabulary: int, values: Values | None
) -> tuple[Tensor | None, Tensor | None]:
    """values -> (values [V] or [N, k], index [N, k] or None)."""
    if values is None:
        return None, None
    if isinstance(values, tuple):
        index, value = values
        index = checks.check_integer_targets("values[0] (index)", index)
        value = checks.check_float("values[1] (value)", value)
        if index.shape != value.shape or tuple(index.shape[:-1]) != tuple(targets.shape):
            raise ValueError(
                f"sparse values must be (index, value), both {list(targets.shape)} + [k], got "
                f"{checks.shape_text(index)} and {checks.shape_text(value)}."
            )
        checks.check_constant("values", value)
        checks.check_same_device("values[0] (index)", index, "targets", targets)
        checks.check_same_device("values[1] (value)", value, "targets", targets)
        k = index.shape[-1]
        if k == 0:
            raise ValueError("sparse values must have at least one entry per row, got none.")
        return value.reshape(-1, k).contiguous(), index.reshape(-1, k).long().contiguous()
    checks.check_float("values", values)
    checks.check_constant("values", values)
    checks.check_same_device("values", values, "targets", targets)
    if tuple(values.shape) != (vocabulary,):
        raise ValueError(
            f"values must be [V] = [{vocabulary}] or a sparse pair (index, value) of [N, k] "
            f"tensors, got {checks.shape_text(values)}; a dense [N, V] is what this op exists to "
            "avoid: pass the top entries of each row, or the head they come from (aux_hidden, "
            "aux_head of linear_divergence)."
        )
    return values.contiguous(), None


def _check_sources(
    stats: tuple[Stat, ...], data: Tensor | None, index: Tensor | None, *, aux: bool
) -> None:
    """Who reads `values` and the third head."""
    names = {s.name for s in stats}
    if {"ev", "xent"} <= names and not aux:
        raise ValueError(
            "values serve ev or xent, not both, and stats has both; call the op twice."
        )
    sources = aux + (data is not None and "xent" not in names)
    if "ev" in names and sources != 1:
        raise ValueError(
            f"the statistic 'ev' needs exactly one source of A, got {sources}; pass values=[V], "
            "values=(index, value), or aux_hidden and aux_head of linear_divergence."
        )
    if "xent" in names and index is None:
        raise ValueError(
            f"the statistic 'xent' needs its teacher, got {'none' if data is None else 'dense '}"
            "values; pass values=(index, probability), both [N, k]."
        )
    if not names & {"ev", "xent"} and (aux or data is not None):
        raise ValueError(
            "values and aux_* serve the statistics 'ev' and 'xent' only; add one to stats or drop "
            "them."
        )
