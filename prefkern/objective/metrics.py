"""The numbers trainers log, under TRL's names; detached, without host synchronisation on a GPU.

No loss computes its own metrics: these are functions of the same sequence statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..ops import ragged
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
    found |= _token_mean("logits/chosen", "zmean", chosen)
    found |= _token_mean("logits/rejected", "zmean", rejected)
    found |= _token_mean("mean_token_accuracy", "top1", chosen)
    return found | _token_mean("entropy", "ent", chosen, rejected)


def unpaired_metrics(seq: SeqStats, desirable: Tensor, rewards: Rewards) -> dict[str, Tensor]:
    """The same names for sequences with a boolean label [S]; a side without rows gives 0.

    rewards/margins is 0 unless both labels are present; there is no accuracy without pairs.
    """
    found: dict[str, Tensor] = {}
    for side, rows in (("chosen", desirable), ("rejected", ~desirable)):
        mask = rows.to(torch.float64)

        def mean(x: Tensor, mask: Tensor = mask) -> Tensor:
            return (x.detach() * mask).sum() / mask.sum().clamp(min=1)

        found[f"logps/{side}"] = mean(seq.require("logp"))
        if rewards is not None:
            found[f"rewards/{side}"] = mean(rewards(seq))
        if seq.fkl is not None:
            found[f"kl/{side}"] = mean(seq.fkl)
        found |= _token_mean(f"logits/{side}", "zmean", seq, rows=mask)
    if rewards is not None:
        both = (desirable.any() & ~desirable.all()).double()
        found["rewards/margins"] = (found["rewards/chosen"] - found["rewards/rejected"]) * both
    found |= _token_mean("mean_token_accuracy", "top1", seq, rows=desirable.to(torch.float64))
    return found | _token_mean("entropy", "ent", seq)


def sequence_metrics(seq: SeqStats, rewards: Rewards) -> dict[str, Tensor]:
    """Means over sequences that have neither labels nor pairs, and token means (0-d tensors)."""
    found = {"logps/mean": seq.require("logp").detach().mean()}
    if rewards is not None and seq.ref_logp is not None:
        found["rewards/mean"] = rewards(seq).detach().mean()
    if seq.fkl is not None:
        found["kl/mean"] = seq.fkl.detach().mean()
    return found | _token_means(seq)


def _token_mean(
    name: str, field: str, *parts: SeqStats, rows: Tensor | float = 1.0
) -> dict[str, Tensor]:
    """Mean over the scored tokens of `parts` (of `rows` of them, 0 or 1 each); left out where the
    statistic was not computed."""
    if getattr(parts[0], field) is None:
        return {}
    total = sum((seq.require(field).detach() * rows).sum() for seq in parts)
    count = sum((seq.require("length") * rows).sum() for seq in parts)
    return {name: cast(Tensor, total) / cast(Tensor, count).clamp(min=1)}


def _token_means(seq: SeqStats) -> dict[str, Tensor]:
    """What is logged of every answer's tokens alike."""
    found = _token_mean("logits/mean", "zmean", seq)
    found |= _token_mean("mean_token_accuracy", "top1", seq)
    return found | _token_mean("entropy", "ent", seq)


class RankStats(NamedTuple):
    """Agreement of scores with relevance inside each group; NaN where nothing can be compared."""

    # [G] gain 2^y - 1, discount 1 / log2(1 + rank); 1 where the ideal is 0; in a group with
    # negative relevance y counts from its lowest
    ndcg: Tensor
    best_first: Tensor  # [G] 1 where the best answer outscores every other
    margin: Tensor  # [G] score of the best answer minus the mean of the others
    # [G] over strict pairs of relevance, score ties count 1/2; None off the host
    pair_accuracy: Tensor | None


def rank_stats(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    at: int | None = None,
) -> RankStats:
    """Ranking quality of each group.

    Args:
        scores: Implicit rewards or mean log-probabilities.
        relevance: Numbers, higher is better; NaN leaves the answer out. Of several answers of
            highest relevance the first is the best one.
        cu_groups: Group boundaries, from 0 to S.
        at: NDCG cut-off. Default None (the whole list).
    """
    scores, relevance = scores.detach().double(), relevance.detach().double()
    valid = ~relevance.isnan()
    group = ragged.owner(cu_groups, scores.shape[0])
    place = ragged.rank(relevance, valid, cu_groups, descending=True)
    best = valid & (place == 0)
    rest = valid & (place > 0)
    g = cu_groups.numel() - 1
    others = _sum(rest.double(), group, g)
    nothing = scores.new_full((g,), torch.nan)

    score_of_best = _sum(torch.where(best, scores, 0.0), group, g)
    highest = scores.new_full((g,), -torch.inf).scatter_reduce_(
        0, group, torch.where(rest, scores, -torch.inf), "amax"
    )
    mean_rest = _sum(torch.where(rest, scores, 0.0), group, g) / others.clamp(min=1)
    accuracy = None
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        right, pairs = _concordance(scores, relevance, valid, group, cu_groups)
        accuracy = torch.where(pairs > 0, right / pairs, nothing)
    gain = _gains(relevance, valid, group, g)
    found = ragged.rank(scores, valid, cu_groups, descending=True)
    return RankStats(
        ndcg=_ndcg(gain, found, place, group, g, at),
        best_first=torch.where(others > 0, (score_of_best > highest).double(), nothing),
        margin=torch.where(others > 0, score_of_best - mean_rest, nothing),
        pair_accuracy=accuracy,
    )


def list_metrics(
    seq: SeqStats, scores: Tensor, relevance: Tensor, cu_groups: Tensor, rewards: Rewards
) -> dict[str, Tensor]:
    """rank/* means over the groups that have something to compare, rewards of the best and of the
    other answers, and token means (0-d tensors).

    rank/pair_accuracy and rank/kendall_tau = 2 pair_accuracy - 1 need the longest group on the host
    and are left out off the CPU.
    """
    found = {}
    stats = rank_stats(scores, relevance, cu_groups)
    found["rank/ndcg"] = stats.ndcg.mean()
    found["rank/best_first"] = stats.best_first.nanmean().nan_to_num()
    if stats.pair_accuracy is not None:
        accuracy = stats.pair_accuracy.nanmean().nan_to_num(nan=0.5)
        found |= {"rank/pair_accuracy": accuracy, "rank/kendall_tau": 2 * accuracy - 1}
    found["logps/mean"] = seq.require("logp").detach().mean()
    if rewards is not None:
        value = rewards(seq).detach()
        best = ragged.first_best(relevance, cu_groups)
        for name, rows in (
            ("rewards/chosen", best), ("rewards/rejected", ~relevance.isnan() & ~best)
        ):  # fmt: skip
            found[name] = torch.where(rows, value, 0.0).sum() / rows.sum().clamp(min=1)
        margins = rank_stats(value, relevance, cu_groups).margin
        found["rewards/margins"] = margins.nanmean().nan_to_num()
    return found | _token_means(seq)


def _sum(x: Tensor, group: Tensor, g: int) -> Tensor:
    return x.new_zeros(g).index_add_(0, group, x)


def _gains(relevance: Tensor, valid: Tensor, group: Tensor, g: int) -> Tensor:  # [S]
    """2^y - 1 over 2^m, m the group's largest relevance: the ratio of two DCGs stays, and no gain
    overflows. m is an integer, so that the division is exact. Where a relevance is negative, the
    group's lowest counts as 0: of negative gains no ratio would be a quality."""
    known = torch.where(valid, relevance, 0.0)
    relevance = relevance - relevance.new_zeros(g).scatter_reduce(0, group, known, "amin")[group]
    best = relevance.new_zeros(g).scatter_reduce(
        0, group, torch.where(valid, relevance, 0.0), "amax"
    )
    m = best.floor()[group]
    return torch.where(valid, torch.exp2(relevance - m) - torch.exp2(-m), 0.0)


def _ndcg(
    gain: Tensor,  # [S] 0 for an answer that is left out
    found: Tensor,  # [S] 0-based place by score
    ideal: Tensor,  # [S] by relevance
    group: Tensor,  # [S]
    g: int,
    at: int | None,
) -> Tensor:  # [G]
    def dcg(place: Tensor) -> Tensor:
        term = gain / torch.log2(2.0 + place)
        return _sum(term if at is None else torch.where(place < at, term, 0.0), group, g)

    best, real = dcg(ideal), dcg(found)
    return torch.where(best > 0, real / torch.where(best > 0, best, 1.0), 1.0)


def _concordance(
    scores: Tensor, relevance: Tensor, valid: Tensor, group: Tensor, cu_groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Rightly ordered strict pairs (ties of scores count 1/2) and their number, per group [G]."""
    g = cu_groups.numel() - 1
    right, pairs = scores.new_zeros(g), scores.new_zeros(g)
    longest = int((cu_groups[1:] - cu_groups[:-1]).max()) if g else 0
    for gap in range(1, longest):  # pairs (i, i + gap): O(S K) in all, no [K, K] table
        same = (group[gap:] == group[:-gap]) & valid[gap:] & valid[:-gap]
        order = torch.sign(relevance[gap:] - relevance[:-gap])
        strict = (same & (order != 0)).double()
        agree = 0.5 + 0.5 * order * torch.sign(scores[gap:] - scores[:-gap])
        right += _sum(torch.where(strict > 0, agree, 0.0), group[gap:], g)
        pairs += _sum(strict, group[gap:], g)
    return right, pairs
