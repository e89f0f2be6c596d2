"""list_rank: value and derivative of ranking losses of ragged groups, one program per group.

Any family but neural_ndcg, groups of any size: a program walks over its group in blocks, O(K^2)
work and O(K) numbers of memory, so the host knows no group size and waits for none. One program is
one streaming multiprocessor at best: lists far beyond K = 1024 work and are slow. The kernels have
one type, fp64: fp32 scores are widened on the way in and results are rounded once on the way out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern.backends.list_options import ListOptions, unpack

from .launches import launch

FAMILIES = (
    "pair", "hinge", "plackett_luce", "softmax", "pro", "nca", "rank_hinge", "anchor",
    "set_contrast", "approx_ndcg",
)  # fmt: skip


def list_rank_fwd(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S], NaN where masked
    cu_groups: Tensor,  # [G+1] int32
    topk: Tensor | None,  # [G] int64
    family: str,
    options: str,
) -> tuple[Tensor, Tensor]:
    """(loss [G], u [S]), both in the dtype of scores."""
    o = unpack(options)
    groups, items = cu_groups.shape[0] - 1, scores.shape[0]
    score, label = scores.double(), labels.double()
    loss = score.new_empty(groups)
    slope = torch.empty_like(score)
    given = (score, label, cu_groups)
    args: tuple[Tensor | int, ...]
    if family in ("pair", "hinge", "rank_hinge"):
        setting = {"hinge": o.margin, "rank_hinge": o.scale}.get(family, 0.0)
        rows = 2 if family == "rank_hinge" or o.weights == "lambda" else 0
        link = "pair" if family == "pair" else "hinge"
        args = (_number(setting, score), _scratch(rows, score), loss, slope, items)
        launch("list_pairs", (groups,), *given, *args, _pair_flags(o, family), o.topn, LINK=link)
    elif family in ("plackett_luce", "pro"):
        stages = cu_groups.new_empty(0, dtype=torch.int64) if topk is None else topk
        args = (stages, _scratch(3, score), loss, slope, items)
        flags = _choice_flags(o, family, topk is not None)
        launch("list_choices", (groups,), *given, *args, flags, FAMILY=family)
    elif family in ("softmax", "nca"):
        target = ("softmax", "sum", "none").index(o.target)
        args = (_number(o.alpha, score), loss, slope, target)
        launch("list_shares", (groups,), *given, *args, FAMILY=family)
    elif family == "set_contrast":
        args = (_number(o.deviation, score), loss, slope, int(labels.dtype == torch.float32))
        launch("list_contrast", (groups,), *given, *args)
    elif family == "anchor":
        args = (_scratch(1, score), loss, slope, int(o.inner == "mean"))
        launch("list_anchor", (groups,), *given, *args)
    elif family == "approx_ndcg":
        args = (_number(o.temperature, score), _scratch(1, score), loss, slope)
        launch("list_ndcg", (groups,), *given, *args)
    else:
        raise ValueError(f"the Triton list_rank has the families {FAMILIES}, got {family!r}.")
    return loss.to(scores.dtype), slope.to(scores.dtype)


def _number(value: float, like: Tensor) -> Tensor:  # [1]
    """An fp64 argument: as a plain number a kernel would get it in fp32."""
    return torch.full((1,), value, dtype=torch.float64, device=like.device)


def _scratch(rows: int, like: Tensor) -> Tensor:  # [rows, S]
    return like.new_empty((rows, like.shape[0]))


# Bits of the flags that list_pairs.py and list_choices.py read, first bit first.
PAIR_FLAGS = (
    "linear", "base2", "dcg2", "normalize", "by_score", "average", "mean", "by_size", "labeldiff",
    "lambda", "by_rank", "product", "per_item",
)  # fmt: skip
CHOICE_FLAGS = ("stable", "breslow", "gain", "topk")


def _bits(names: tuple[str, ...], on: dict[str, bool]) -> int:
    return sum(1 << names.index(name) for name, chosen in on.items() if chosen)


def _pair_flags(o: ListOptions, family: str) -> int:
    on = {
        "by_rank": family == "rank_hinge",
        "product": o.mode == "product",
        "per_item": o.per_item,
        "mean": o.pair_reduction == "mean",
        "by_size": o.scale_by_list_size,
        "labeldiff": o.weights == "labeldiff",
    }
    if o.weights == "lambda":
        on |= {
            "lambda": True,
            "linear": o.gain == "linear",
            "base2": o.log_base == "2",
            "dcg2": o.form == "dcg2",
            "normalize": o.normalize,
            "by_score": o.rank_source == "score",
            "average": o.tie_rank == "average",
        }
    return _bits(PAIR_FLAGS, on)


def _choice_flags(o: ListOptions, family: str, topk: bool) -> int:
    ties = "stable" if family == "pro" else o.ties  # pro puts items in label order
    on = {
        "stable": ties == "stable",
        "breslow": ties == "breslow",
        "gain": o.item_gain == "exp2",
        "topk": topk,
    }
    return _bits(CHOICE_FLAGS, on)
