"""From token statistics to sequence statistics, and from sequences to groups.

Shapes: N packed tokens, S sequences, P pairs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..losses.record import TokenWeights
from ..ops.segment_sum import segment_sum
from ..stats import SeqStats, TokenStats


def sequence_boundaries(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """cu_seqlens [S+1] int32 of flattened targets: as given, or one sequence per row of [B, T].

    Raises:
        ValueError: 1-d targets without cu_seqlens, boundaries that do not fit, no sequence.
    """
    if cu_seqlens is None:
        if targets.dim() != 2:
            raise ValueError(
                f"cu_seqlens must be given for packed targets {checks.shape_text(targets)}; pass "
                "the "
                "boundaries [S+1] of the sequences, or padded [B, T] input."
            )
        b, t = targets.shape
        cu_seqlens = torch.arange(0, b + 1, dtype=torch.int32, device=targets.device) * t
    cu_seqlens = checks.check_cu_seqlens(cu_seqlens, targets.numel())
    checks.check_same_device("cu_seqlens", cu_seqlens, "targets", targets)
    if cu_seqlens.numel() < 2:
        raise ValueError("the batch must hold at least one sequence, got none; skip empty batches.")
    return checks.narrow_boundaries(cu_seqlens, targets.numel())


def sequence_stats(
    tokens: TokenStats,
    targets: Tensor,  # [N] or [B, T]
    cu_seqlens: Tensor,  # [S+1]
    *,
    token_weights: Tensor | dict[str, Tensor] | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> SeqStats:
    """Weighted fp64 sums of every token statistic over each sequence, and the scored length.

    Args:
        tokens: Token statistics, each field in the shape of `targets`.
        targets: Labels; a position counts in `length` where it is not `ignore_index`.
        cu_seqlens: Boundaries `[S+1]` on the flattened token axis.
        token_weights: One tensor like `targets` for all statistics, or a dict statistic -> tensor
            (a missing key means 1; "logp" weighs `ref_logp` too). May require grad.
        ignore_index: Label of positions that do not count. Default -100.
        backend: As in the ops.

    Returns:
        SeqStats, each field `[S]` fp64.

    Raises:
        ValueError: weights of another shape, or for statistics that are not there.
    """
    fields = {
        name: x.reshape(-1) for name in tokens._fields if (x := getattr(tokens, name)) is not None
    }
    scored = (targets != ignore_index).reshape(-1)
    sums: dict[str, Tensor] = {}
    for names, weight in _by_weight(fields, token_weights, targets.shape):
        columns = torch.stack([fields[name] for name in names])
        if weight is not None:
            weight = torch.where(scored, weight, torch.zeros_like(weight)).to(columns.dtype)
        out = segment_sum(columns, cu_seqlens, weights=weight, backend=backend)
        sums.update(zip(names, out.unbind(0), strict=True))
    length = segment_sum(scored.to(torch.float32), cu_seqlens, backend=backend)
    return SeqStats(length=length, **sums)


def _by_weight(
    fields: dict[str, Tensor], token_weights: Tensor | dict[str, Tensor] | None, shape: torch.Size
) -> list[tuple[list[str], Tensor | None]]:
    """Groups of statistics that share a weight tensor, each summed by one call."""
    if not isinstance(token_weights, dict):
        return [(list(fields), _flat("token_weights", token_weights, shape))]
    unknown = [name for name in token_weights if name not in fields]
    if unknown:
        raise ValueError(
            f"token_weights may weigh the statistics at hand {tuple(fields)}, got {unknown}; "
            "drop them, "
            "or use a loss that reads those statistics."
        )
    groups: dict[int, tuple[list[str], Tensor | None]] = {}
    for name in fields:
        weight = token_weights.get(name, token_weights.get("logp") if name == "ref_logp" else None)
        groups.setdefault(id(weight), ([], _flat(f"token_weights[{name!r}]", weight, shape)))[
            0
        ].append(name)
    return list(groups.values())


def _flat(name: str, weight: Tensor | None, shape: torch.Size) -> Tensor | None:
    if weight is None:
        return None
    checks.check_float(name, weight)
    if weight.shape != shape and tuple(weight.shape) != (shape.numel(),):
        raise ValueError(
            f"{name} must have the shape of targets {list(shape)}, got {checks.shape_text(weight)}."
        )
    return weight.reshape(-1)


def combine_weights(
    stage: TokenWeights | None,
    user: Tensor | dict[str, Tensor] | None,
    fields: tuple[str, ...],
) -> dict[str, Tensor]:
    """Product of a stage's weights and the caller's for each statistic of `fields`; a statistic
    that neither weighs is left out. Statistics with the same weight share one tensor."""
    sources = [w for w in (None if stage is None else stage.weights, user) if w is not None]
    made: dict[tuple[int, ...], Tensor] = {}
    found = {}
    for name in fields:
        key = "logp" if name == "ref_logp" else name
        given = [w if isinstance(w, Tensor) else w.get(key) for w in sources]
        parts = [w for w in given if w is not None]
        if parts:
            ids = tuple(map(id, parts))
            if ids not in made:
                made[ids] = (
                    parts[0] if len(parts) == 1 else parts[0].reshape(-1) * parts[1].reshape(-1)
                )
            found[name] = made[ids]
    return found


def split_rows(seq: SeqStats, rows: int, layout: str, names: tuple[str, ...]) -> list[SeqStats]:
    """The sequences of each role: neighbours ("pairs") or consecutive parts ("halves"), each [P].

    Raises:
        ValueError: a number of sequences that is not a multiple of `rows`, an unknown layout.
    """
    s = seq.require("length").shape[0]
    if layout not in ("pairs", "halves"):
        raise ValueError(
            "layout must be 'pairs' (chosen, rejected, chosen, ...) or 'halves' (all chosen, "
            "then all "
            f"rejected), got {layout!r}."
        )
    if s % rows:
        raise ValueError(
            f"the number of sequences must be a multiple of {rows} ({', '.join(names)}), got {s}; "
            "pass every answer of every group."
        )
    if layout == "pairs":
        return [seq.index(slice(i, None, rows)) for i in range(rows)]
    p = s // rows
    return [seq.index(slice(i * p, (i + 1) * p)) for i in range(rows)]


def role_of_sequence(s: int, rows: int, layout: str, device: torch.device) -> Tensor:
    """Index of each sequence's role within its group [S]: 0 chosen, 1 rejected, ..."""
    position = torch.arange(s, device=device)
    return position % rows if layout == "pairs" else position // max(s // rows, 1)
