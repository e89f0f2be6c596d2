"""Training data from the policy's own answers: sample, score, form pairs, lists or rewards.

What is formed follows from the loss: pairs for pairwise losses (with the judge's probability where
the loss reads one), lists for listwise ones, single answers with their target or advantages for
`fdpg`, `rto` and `grpo`. K answers per prompt.

Answers pass as text and are tokenised again with their prompt, as any data set is; where a model
spelled a word in other pieces than the tokenizer does (2 of 128 answers of a 260K story model), it
is trained on the tokenizer's, and log-probabilities are of those too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..integrations import hf
from ..losses import advantages
from ..losses.pointwise import fdpg
from ..losses.record import Loss
from ..prep import pairs_from_lists
from ..prep.prompts import SEPARATOR, prefixed
from .config import TrainConfig
from .judges import Judge, Row, answer_logps, completion, training_row
from .sampling import Answer

# Optional arguments that online rows always bring along as columns of the same name.
BROUGHT = {"fdpg": ("proposal_logp",), "rto": ("old_logp",), "advantages": ("old_logp",)}


@dataclass
class OnlineReport:
    """What became of the sampled answers."""

    counts: Counter[str] = field(default_factory=Counter)
    score: float = math.nan  # mean over the answers that were judged

    def __str__(self) -> str:
        parts = [f"{n} {what}" for what, n in self.counts.items() if n]
        return f"{', '.join(parts)}; mean score {self.score:.4g}"


def kind_of(records: Sequence[Loss]) -> str:
    """What rows the losses train on: pairs, lists, fdpg, rto or advantages.

    Raises:
        ValueError: losses that read different rows, or rows that sampling cannot make.
    """
    kinds = set()
    for record in records:
        needed = losses.required(record)
        if record.name == "fdpg":
            kinds.add("fdpg")
        elif record.name == "rto":
            kinds.add("rto")
        elif "advantages" in needed:
            kinds.add("advantages")
        elif record.family == "listwise":
            kinds.add("lists")
        elif record.family == "pairwise" and len(record.rows) == 2:
            kinds.add("pairs")
        else:
            raise ValueError(
                f"online rounds cannot make the rows that loss {record.name!r} reads: they make "
                "pairs, lists, and single answers for fdpg, rto and grpo."
            )
    if len(kinds) > 1:
        raise ValueError(
            f"losses {[r.name for r in records]} read different rows: {sorted(kinds)}."
        )
    return kinds.pop()


def judged_lists(
    rows: Sequence[Row],
    answers: Sequence[Sequence[Answer]],
    judge: Judge,
    *,
    keep_unfinished: bool = False,
    distinct: bool = True,
    least: int = 2,
) -> tuple[list[dict[str, Any]], OnlineReport]:
    """One row per prompt with `completions`, `scores` and the prompt.

    Left out are answers that were cut off (unless `keep_unfinished`), blank ones, repeated ones (if
    `distinct`) and those the judge scores -inf; and prompts with fewer than `least` answers left.

    Raises:
        ValueError: nothing is left; the judge's own errors.
    """
    report = OnlineReport()
    kept_rows, texts = [], []
    for row, given in zip(rows, answers, strict=True):
        report.counts["answers"] += len(given)
        kept: list[str] = []
        for answer in given:
            if not (answer.finished or keep_unfinished):
                report.counts["cut off"] += 1
            elif not answer.text.strip():
                report.counts["blank"] += 1
            elif distinct and answer.text in kept:
                report.counts["repeated"] += 1
            else:
                kept.append(answer.text)
        if len(kept) >= least:
            kept_rows.append(row)
            texts.append(kept)
        else:
            report.counts["prompts without enough answers"] += 1
    out, total = [], []
    scores = judge(kept_rows, texts) if kept_rows else []
    for row, answered, values in zip(kept_rows, texts, scores, strict=True):
        good = [(t, s) for t, s in zip(answered, values, strict=True) if s != -math.inf]
        report.counts["unusable"] += len(answered) - len(good)
        if len(good) < least:
            report.counts["prompts without enough answers"] += 1
            continue
        total += [s for _, s in good]
        out.append(
            training_row(row)
            | {"completions": [completion(row, t) for t, _ in good], "scores": [s for _, s in good]}
        )
    if not out:
        raise ValueError(
            f"no prompt has {least} answers to train on ({report}); raise max_new_tokens or "
            "num_generations, or set keep_unfinished."
        )
    report.counts["prompts"] = len(out)
    report.score = math.fsum(total) / len(total)
    return out, report


def pair_rows(
    lists: list[dict[str, Any]], *, pairs: str, probability: str | None = None
) -> list[dict[str, Any]]:
    """Pairs of each list; with `probability`, a column of that name: sigmoid of the score gap.

    Raises:
        ValueError: no two answers to any prompt have different scores.
    """
    made = pairs_from_lists(_ranked(lists), pairs=pairs)
    if probability is not None:
        for row in made:
            gap = torch.tensor(row["chosen_score"] - row["rejected_score"], dtype=torch.float64)
            row[probability] = float(torch.sigmoid(gap))
    return made


def _ranked(lists: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lists in which an answer is better than another."""
    usable = [row for row in lists if min(row["scores"]) < max(row["scores"])]
    if not usable:
        raise ValueError(
            "the judge gave all answers to every prompt the same score, so nothing is preferred; "
            "look at what it returns, or raise num_generations."
        )
    return usable


def soft_pair_columns(scores: Sequence[float]) -> dict[str, Any]:
    """soft_pairs' columns of a list: every pair with different scores, and sigmoid of its gap."""
    k = range(len(scores))
    pairs = [[i, j] for i in k for j in k if scores[i] > scores[j]]
    gaps = torch.tensor([scores[i] - scores[j] for i, j in pairs], dtype=torch.float64)
    return {"pairs": pairs, "pref_prob": torch.sigmoid(gaps).tolist()}


def target_rows(
    lists: list[dict[str, Any]],
    ref_logps: Sequence[float],  # one per answer, in order
    own_logps: Sequence[float],
    *,
    beta: float,
) -> list[dict[str, Any]]:
    """Single answers with f-DPG's columns: `log_target_prob` and `proposal_logp`.

    The target is p(y|x) = r(y|x) exp(score / beta) / Z(x), r the reference; Z(x) is estimated from
    the answers to x, which were drawn from q: Z = mean of r exp(score / beta) / q.
    """
    out, at = [], 0
    for row in lists:
        k = len(row["completions"])
        score = torch.tensor(row["scores"], dtype=torch.float64)
        ref = torch.tensor(ref_logps[at : at + k], dtype=torch.float64)
        own = torch.tensor(own_logps[at : at + k], dtype=torch.float64)
        at += k
        log_p = ref + score / beta
        log_z = torch.logsumexp(log_p - own, 0) - math.log(k)
        rest = {n: v for n, v in row.items() if n not in ("completions", "scores")}
        for i, text in enumerate(row["completions"]):
            columns = {"log_target_prob": float(log_p[i] - log_z), "proposal_logp": float(own[i])}
            out.append(rest | {"completion": text} | columns)
    return out


def fdpg_baseline(rows: Sequence[Row], divergence: str = "js") -> float:
    """Mean of -f' over a round's answers under the policy that drew them: the round's baseline."""
    own, target = (
        torch.tensor([row[name] for row in rows], dtype=torch.float64)
        for name in ("proposal_logp", "log_target_prob")
    )
    return float(fdpg.advantages(own, target, divergence).mean())


def advantage_rows(
    lists: list[dict[str, Any]], own_logps: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Single answers with `advantages` (group-relative) and `old_logp` per token."""
    scores = torch.tensor([s for row in lists for s in row["scores"]], dtype=torch.float64)
    sizes = torch.tensor([0, *(len(row["scores"]) for row in lists)])
    values = advantages.group_advantages(scores, sizes.cumsum(0).int())
    return _single(lists, own_logps, [float(value) for value in values])


def rto_rows(
    lists: list[dict[str, Any]],
    dpo_logps: Sequence[Tensor],  # each [t]
    ref_logps: Sequence[Tensor],
    own_logps: Sequence[Tensor],
) -> list[dict[str, Any]]:
    """Single answers with RTO's columns: `advantages` and `old_logp` per token.

    Token rewards are a DPO-trained model's log-ratios, a KL penalty and the score at the end,
    which is normalised over all answers here; advantages without a value head, whitened.
    """
    scores = torch.tensor([s for row in lists for s in row["scores"]], dtype=torch.float64)
    scores = (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-8)
    sizes = [len(x) for x in own_logps]
    cu = torch.tensor([0, *sizes]).cumsum(0).int()
    dpo, ref, own = (torch.cat(list(x)).double() for x in (dpo_logps, ref_logps, own_logps))
    every = torch.ones(len(own), dtype=torch.bool)
    rewards = advantages.rto_rewards(dpo, ref, own, scores, cu, every)
    values, _ = advantages.gae(rewards, torch.zeros_like(rewards), cu, every)
    whitened = advantages.whiten(values, every)
    return _single(lists, own_logps, [x.tolist() for x in whitened.split(sizes)])


def _single(
    lists: list[dict[str, Any]], own_logps: Sequence[Tensor], values: Sequence[Any]
) -> list[dict[str, Any]]:
    out, at = [], 0
    for row in lists:
        rest = {n: v for n, v in row.items() if n not in ("completions", "scores")}
        for text in row["completions"]:
            columns = {"advantages": values[at], "old_logp": own_logps[at].tolist()}
            out.append(rest | {"completion": text} | columns)
            at += 1
    return out


def training_rows(
    lists: list[dict[str, Any]],
    records: Sequence[Loss],
    config: TrainConfig,
    *,
    policy: hf.Model,
    tokenizer: Any,
    reference: hf.Model | None = None,
    off: Callable[[], AbstractContextManager] | None = None,
    aux: hf.Model | None = None,
) -> list[dict[str, Any]]:
    """The rows that the losses train on, made of judged lists.

    `reference` is the start of f-DPG's target and of RTO's log-ratios; None takes the policy in
    the context `off` (its adapter switched off). `aux` is RTO's DPO-trained model.
    """
    kind = kind_of(records)
    if kind == "lists":
        ranked = _ranked(lists)
        soft = any("pairs" in losses.required(record) for record in records)
        return [row | soft_pair_columns(row["scores"]) for row in ranked] if soft else ranked
    if kind == "pairs":
        needs = any("pref_prob" in losses.required(record) for record in records)
        name = "preference_prob" if config.soft_judge else "pref_prob" if needs else None
        return pair_rows(lists, pairs=config.online_pairs, probability=name)
    texts = [_text(text) for row in lists for text in row["completions"]]
    rows = [row for row in lists for _ in row["completions"]]
    own = answer_logps(policy, tokenizer, rows, texts, config)
    if kind == "advantages":
        lists, (old,) = _usable(lists, own)
        return advantage_rows(lists, old)
    if reference is not None:
        ref = answer_logps(reference, tokenizer, rows, texts, config)
    elif off is not None:
        ref = answer_logps(policy, tokenizer, rows, texts, config, off=off)
    else:
        raise ValueError(f"loss {records[0].name!r} needs a reference to score samples against.")
    if kind == "fdpg":
        lists, both = _usable(lists, ref, own)
        sums = ([float(x.double().sum()) for x in side] for side in both)
        return target_rows(lists, *sums, beta=config.target_beta)
    if aux is None:
        raise ValueError("loss 'rto' reads token rewards off a DPO-trained model: set aux_model.")
    dpo = answer_logps(aux, tokenizer, rows, texts, config)
    lists, three = _usable(lists, dpo, ref, own)
    return rto_rows(lists, *three)


def _usable(
    lists: list[dict[str, Any]], *columns: list[Tensor | None]
) -> tuple[list[dict[str, Any]], list[list[Tensor]]]:
    """The lists and columns without the answers that some model could not read."""
    good = [all(column[i] is not None for column in columns) for i in range(len(columns[0]))]
    kept, at = [], 0
    for row in lists:
        flags = good[at : at + len(row["completions"])]
        at += len(flags)
        if any(flags):
            kept.append(
                row
                | {
                    name: [x for x, ok in zip(row[name], flags, strict=True) if ok]
                    for name in ("completions", "scores")
                }
            )
    picked = [[x for x, ok in zip(c, good, strict=True) if ok and x is not None] for c in columns]
    return kept, picked


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer[0]["content"]


def direction_prompts(
    rows: Sequence[Row],
    directions: Sequence[Sequence[float]],
    *,
    objectives: Sequence[str],
    template: str | None = None,
    separator: str = SEPARATOR,
) -> list[dict[str, Any]]:
    """Every prompt once under every direction, with the column `direction` for the judge.

    The prompts of a DPA round (arXiv 2402.18571): the judge returns direction . rewards, pairs are
    best_vs_worst, the loss is sft, which reads the best answer alone. The condition reads as in
    `prefkern.prep.direction_conditioned`.
    """
    from ..prep.conditioning import DIRECTION_TEMPLATE, direction_words

    return [
        {**row, "prompt": prefixed(row["prompt"], words, separator), "direction": list(vector)}
        for row in rows
        for vector in directions
        for words in (direction_words(vector, objectives, template or DIRECTION_TEMPLATE),)
    ]
