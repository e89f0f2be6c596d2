"""The numbers trainers log, under TRL's names; detached, without host synchronisation on a GPU.

No loss computes its own metrics: these are functions of the same sequence statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..stats import SeqStats

Rewards = Callable[[SeqStats], Tensor] | None


def pair_metrics(
    chosen: SeqStats, rejected: SeqStats, rewards: Rewards, logps: str = "logp"
) -> dict[str, Tensor]:
    """rewards/*, logps/*, logits/*, kl/*, entropy and token accuracy of P pairs (0-d tensors).

    Args:
        chosen, rejected: Sequence statistics, each field `[P]`.
        rewards: Function SeqStats -> implicit rewards `[P]`, or None to leave rewards/* out.
        logps: Property of SeqStats logged as logps/*. Default "logp" (sums).
    """
    found = {
        "logps/chosen": getattr(chosen, logps).detach().mean(),
        "logps/rejected": getattr(rejected, logps).detach().mean(),
    }
    if rewards is not None:
        reward_w, reward_l = rewards(chosen).detach(), rewards(rejected).detach()
        found |= {
            "rewards/chosen": reward_w.mean(),
            "rewards/rejected": reward_l.mean(),
            "rewards/margins": (reward_w - reward_l).mean(),
            "rewards/accuracies": (reward_w > reward_l).double().mean(),
        }
    if chosen.fkl is not None:
        kl_w, kl_l = chosen.fkl.detach(), rejected.require("fkl").detach()
        found |= {
            "kl/chosen": kl_w.mean(),
            "kl/rejected": kl_l.mean(),
            "kl/margin": (kl_w - kl_l).mean(),
        }
    found |= _per_token("logits/chosen", chosen.zmean, chosen.length)
    found |= _per_token("logits/rejected", rejected.zmean, rejected.length)
    found |= _per_token("mean_token_accuracy", chosen.top1, chosen.length)
    if chosen.ent is not None:
        both = torch.stack((chosen.ent.sum(), rejected.require("ent").sum())).detach()
        lengths = (chosen.require("length").sum(), rejected.require("length").sum())
        found |= _per_token("entropy", both, torch.stack(lengths))
    return found


def unpaired_metrics(seq: SeqStats, labels: Tensor, rewards: Rewards) -> dict[str, Tensor]:
    """The same names for sequences with a boolean label [S]; a side without rows gives 0.

    rewards/margins is 0 unless both labels are present; there is no accuracy without pairs.
    """
    found: dict[str, Tensor] = {}
    counts = {}
    for side, rows in (("chosen", labels), ("rejected", ~labels)):
        mask = rows.to(torch.float64)
        counts[side] = mask.sum()

        def mean(x: Tensor, mask: Tensor = mask) -> Tensor:
            return (x.detach() * mask).sum() / mask.sum().clamp(min=1)

        found[f"logps/{side}"] = mean(seq.require("logp"))
        if rewards is not None:
            found[f"rewards/{side}"] = mean(rewards(seq))
        if seq.fkl is not None:
            found[f"kl/{side}"] = mean(seq.fkl)
        if seq.zmean is not None:
            found |= _per_token(f"logits/{side}", seq.zmean * mask, seq.require("length") * mask)
    if rewards is not None:
        both = (counts["chosen"] * counts["rejected"] > 0).double()
        found["rewards/margins"] = (found["rewards/chosen"] - found["rewards/rejected"]) * both
    if seq.top1 is not None:
        mask = labels.to(torch.float64)
        found |= _per_token("mean_token_accuracy", seq.top1 * mask, seq.require("length") * mask)
    found |= _per_token("entropy", seq.ent, seq.length)
    return found


def sequence_metrics(seq: SeqStats, rewards: Rewards) -> dict[str, Tensor]:
    """Means over sequences that have neither labels nor pairs, and token means (0-d tensors)."""
    found = {"logps/mean": seq.require("logp").detach().mean()}
    if rewards is not None and seq.ref_logp is not None:
        found["rewards/mean"] = rewards(seq).detach().mean()
    if seq.fkl is not None:
        found["kl/mean"] = seq.fkl.detach().mean()
    found |= _per_token("logits/mean", seq.zmean, seq.length)
    found |= _per_token("mean_token_accuracy", seq.top1, seq.length)
    found |= _per_token("entropy", seq.ent, seq.length)
    return found


def _per_token(name: str, total: Tensor | None, count: Tensor | None) -> dict[str, Tensor]:
    """Mean over scored tokens; left out where the statistic was not computed."""
    if total is None:
        return {}
    assert count is not None
    return {name: total.detach().sum() / count.sum().clamp(min=1)}


class RankStats(NamedTuple):
    """Agreement of scores with labels inside each group; NaN where nothing can be compared."""

    ndcg: Tensor  # [G] gain 2^y - 1, discount 1 / log2(1 + rank); 1 where the ideal is 0
    best_first: Tensor  # [G] 1 where the best-labelled item outscores every other
    margin: Tensor  # [G] score of the best-labelled item minus the mean of the others
    pair_accuracy: (
        Tensor | None
    )  # [G] over strict label pairs, score ties count 1/2; None off the host


def rank_stats(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    at: int | None = None,
) -> RankStats:
    """Ranking quality of each group.

    Args:
        scores: Implicit rewards or mean log-probabilities.
        labels: Relevance, higher is better; NaN leaves the item out. Of several items with the
            highest label the first is the best one.
        cu_groups: Group boundaries, from 0 to S.
        at: NDCG cut-off. Default None (the whole list).
    """
    scores, labels = scores.detach().double(), labels.detach().double()
    valid = ~labels.isnan()
    group = _group_of(cu_groups, scores.shape[0])
    by_label = _rank(labels, valid, group, cu_groups)
    best = valid & (by_label == 1)
    rest = valid & (by_label > 1)
    g = cu_groups.numel() - 1
    comparable = _sum(rest.double(), group, g) > 0
    nothing = scores.new_full((g,), torch.nan)

    score_of_best = _sum(torch.where(best, scores, 0.0), group, g)
    highest = scores.new_full((g,), -torch.inf).scatter_reduce_(
        0, group, torch.where(rest, scores, -torch.inf), "amax"
    )
    mean_rest = _sum(torch.where(rest, scores, 0.0), group, g) / _sum(
        rest.double(), group, g
    ).clamp(min=1)
    accuracy = None
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        right, pairs = _concordance(scores, labels, valid, group, cu_groups, g)
        accuracy = torch.where(pairs > 0, right / pairs, nothing)
    return RankStats(
        ndcg=_ndcg(scores, labels, valid, group, cu_groups, by_label, at),
        best_first=torch.where(comparable, (score_of_best > highest).double(), nothing),
        margin=torch.where(comparable, score_of_best - mean_rest, nothing),
        pair_accuracy=accuracy,
    )


def list_metrics(
    seq: SeqStats, scores: Tensor, labels: Tensor, cu_groups: Tensor, rewards: Rewards
) -> dict[str, Tensor]:
    """rank/* means over the groups that have something to compare, rewards of the best and of the
    other answers, and token means (0-d tensors).

    rank/pair_accuracy and rank/kendall_tau = 2 pair_accuracy - 1 need the longest group on the host
    and are left out off the CPU.
    """
    found = {}
    stats = rank_stats(scores, labels, cu_groups)
    found["rank/ndcg"] = stats.ndcg.mean()
    found["rank/best_first"] = stats.best_first.nanmean().nan_to_num()
    if stats.pair_accuracy is not None:
        accuracy = stats.pair_accuracy.nanmean().nan_to_num(nan=0.5)
        found |= {"rank/pair_accuracy": accuracy, "rank/kendall_tau": 2 * accuracy - 1}
    found["logps/mean"] = seq.require("logp").detach().mean()
    if rewards is not None:
        value = rewards(seq).detach()
        group, valid = _group_of(cu_groups, value.shape[0]), ~labels.isnan()
        rank = _rank(labels.double(), valid, group, cu_groups)
        for name, rows in (
            ("rewards/chosen", valid & (rank == 1)),
            ("rewards/rejected", valid & (rank > 1)),
        ):
            found[name] = torch.where(rows, value, 0.0).sum() / rows.sum().clamp(min=1)
        found["rewards/margins"] = (
            rank_stats(value, labels, cu_groups).margin.nanmean().nan_to_num()
        )
    found |= _per_token("logits/mean", seq.zmean, seq.length)
    found |= _per_token("mean_token_accuracy", seq.top1, seq.length)
    found |= _per_token("entropy", seq.ent, seq.length)
    return found


def _sum(x: Tensor, group: Tensor, g: int) -> Tensor:
    return x.new_zeros(g).index_add_(0, group, x)


def _group_of(cu_groups: Tensor, s: int) -> Tensor:
    positions = torch.arange(s, device=cu_groups.device)
    return torch.searchsorted(cu_groups[1:].contiguous(), positions, right=True)


def _rank(key: Tensor, valid: Tensor, group: Tensor, cu_groups: Tensor) -> Tensor:
    """1-based descending rank inside the group [S]; position breaks ties, left-out items last."""
    order = torch.argsort(torch.where(valid, key, -torch.inf), descending=True, stable=True)
    order = order[torch.argsort((~valid)[order].long(), stable=True)]
    order = order[torch.argsort(group[order], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    return rank - cu_groups.long()[group] + 1


def _ndcg(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor,
    group: Tensor,
    cu_groups: Tensor,
    by_label: Tensor,
    at: int | None,
) -> Tensor:
    gain = torch.where(valid, torch.exp2(labels) - 1, 0.0)
    g = cu_groups.numel() - 1

    def dcg(rank: Tensor) -> Tensor:
        term = gain / torch.log2(1.0 + rank)
        return _sum(term if at is None else torch.where(rank <= at, term, 0.0), group, g)

    ideal, found = dcg(by_label), dcg(_rank(scores, valid, group, cu_groups))
    return torch.where(ideal > 0, found / torch.where(ideal > 0, ideal, 1.0), 1.0)


def _concordance(
    scores: Tensor, labels: Tensor, valid: Tensor, group: Tensor, cu_groups: Tensor, g: int
) -> tuple[Tensor, Tensor]:
    """Rightly ordered strict pairs (ties of scores count 1/2) and their number, per group [G]."""
    right, pairs = scores.new_zeros(g), scores.new_zeros(g)
    longest = int((cu_groups[1:] - cu_groups[:-1]).max()) if g else 0
    for gap in range(1, longest):  # pairs (i, i + gap): O(S K) in all, no [K, K] table
        same = (group[gap:] == group[:-gap]) & valid[gap:] & valid[:-gap]
        label = torch.sign(labels[gap:] - labels[:-gap])
        strict = (same & (label != 0)).double()
        agree = 0.5 + 0.5 * label * torch.sign(scores[gap:] - scores[:-gap])
        right += _sum(torch.where(strict > 0, agree, 0.0), group[gap:], g)
        pairs += _sum(strict, group[gap:], g)
    return right, pairs
