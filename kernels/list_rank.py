"""list_rank: value and derivative of ranking losses of ragged groups, one program per group.

Groups of any size: a program walks over its group in blocks, O(K^2) work and O(K) numbers of
memory, so the host knows no group size and waits for none. One program is one streaming
multiprocessor at best: lists far beyond K = 1024 work and are slow. The kernels have one type,
fp64: fp32 scores are widened on the way in and results are rounded once on the way out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern.backends.list_options import ListOptions, unpack

from .launches import launch


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
    if groups == 0:
        return loss.to(scores.dtype), torch.zeros_like(scores)
    given = (score, label, cu_groups)
    if family == "pair":
        args = (_scratch(2 if o.weights == "lambda" else 0, score), loss, slope, items)
        launch("list_pairs", (groups,), *given, *args, _pair_flags(o), o.topn)
    elif family == "plackett_luce":
        stages = cu_groups.new_empty(0, dtype=torch.int64) if topk is None else topk
        args = (stages, _scratch(3, score), loss, slope, items)
        launch("list_choices", (groups,), *given, *args, _choice_flags(o, topk is not None))
    else:
        # alpha as fp64: as a plain number a kernel would get it in fp32
        alpha = torch.full((1,), o.alpha, dtype=torch.float64, device=score.device)
        target = ("softmax", "sum", "none").index(o.target)
        launch("list_shares", (groups,), *given, alpha, loss, slope, items, target)
    return loss.to(scores.dtype), slope.to(scores.dtype)


def _scratch(rows: int, like: Tensor) -> Tensor:  # [rows, S]
    return like.new_empty((rows, like.shape[0]))


# Bits of the flags that list_pairs.py and list_choices.py read, first bit first.
PAIR_FLAGS = (
    "linear", "base2", "dcg2", "normalize", "by_score", "average", "mean", "by_size", "labeldiff",
    "lambda",
)  # fmt: skip
CHOICE_FLAGS = ("stable", "breslow", "gain", "topk")


def _bits(names: tuple[str, ...], on: dict[str, bool]) -> int:
    return sum(1 << names.index(name) for name, chosen in on.items() if chosen)


def _pair_flags(o: ListOptions) -> int:
    on = {
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


def _choice_flags(o: ListOptions, topk: bool) -> int:
    on = {
        "stable": o.ties == "stable",
        "breslow": o.ties == "breslow",
        "gain": o.item_gain == "exp2",
        "topk": topk,
    }
    return _bits(CHOICE_FLAGS, on)
