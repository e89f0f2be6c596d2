"""Which of the sampled answers are trained on: what is left out, and the scores of the rest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..answer_logps import Prompt, as_completion, training_row
from .judges import Judge
from .sampling import Answer


class NothingToTrain(ValueError):
    """No answers that a loss can learn from: all alike, cut off, or equally good."""


@dataclass
class OnlineReport:
    """What became of the sampled answers."""

    counts: Counter[str] = field(default_factory=Counter)
    score: float = math.nan  # mean over the answers that were judged
    objectives: list[float] = field(default_factory=list)  # the same of each, where judged apart

    def __str__(self) -> str:
        parts = [f"{n} {what}" for what, n in self.counts.items() if n]
        return f"{', '.join(parts)}; mean score {self.score:.4g}"


def judged_lists(
    rows: Sequence[Prompt],
    answers: Sequence[Sequence[Answer]],
    judge: Judge,
    *,
    keep_unfinished: bool = False,
    distinct: bool = True,
    least: int = 2,
    weights: Sequence[float] | None = None,
    keeps: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], OnlineReport]:
    """One row per prompt with `completions`, `scores` and the prompt.

    Left out are answers that were cut off (unless `keep_unfinished`), blank ones, repeated ones (if
    `distinct`) and those the judge scores -inf; and prompts with fewer than `least` answers left.

    Args:
        weights: Factor of each objective of a judge of several: an answer's score is their sum, and
            its numbers one by one stand in `objectives`.
        keeps: Columns of a prompt's row that go on with it.

    Raises:
        NothingToTrain: nothing is left.
        ValueError: scores that do not fit the weights; the judge's own errors.
    """
    report = OnlineReport()
    kept = [
        (row, texts)
        for row, given in zip(rows, answers, strict=True)
        if len(texts := _texts(given, report, keep_unfinished, distinct)) >= least
    ]
    if short := len(rows) - len(kept):
        report.counts["prompts without enough answers"] += short
    scores = judge([row for row, _ in kept], [texts for _, texts in kept]) if kept else []
    out: list[dict[str, Any]] = []
    for (row, texts), values in zip(kept, scores, strict=True):
        totals = [_total(value, weights) for value in values]
        good = [i for i, total in enumerate(totals) if total != -math.inf]
        report.counts["unusable"] += len(texts) - len(good)
        if len(good) < least:
            report.counts["prompts without enough answers"] += 1
            continue
        made = training_row(row) | {name: row[name] for name in keeps}
        made["completions"] = [as_completion(row, texts[i]) for i in good]
        made["scores"] = [totals[i] for i in good]
        if weights is not None:
            made["objectives"] = [values[i] for i in good]
        out.append(made)
    if not out:
        raise NothingToTrain(
            f"no prompt has {least} answers to train on ({report}); raise max_new_tokens or "
            "num_generations, or set keep_unfinished."
        )
    report.counts["prompts"] = len(out)
    total = [score for row in out for score in row["scores"]]
    report.score = math.fsum(total) / len(total)
    if weights is not None:
        columns = zip(*(vector for row in out for vector in row["objectives"]), strict=True)
        report.objectives = [math.fsum(column) / len(column) for column in columns]
    return out, report


def _total(value: float | list[float], weights: Sequence[float] | None) -> float:
    """The score of an answer, a weighted sum where the judge gave several numbers."""
    if isinstance(value, float):
        if weights is not None:
            raise ValueError(
                f"judge_weights has {len(weights)} factors, and the judge returns one number per "
                "answer; return a list of numbers for each, or drop judge_weights."
            )
        return value
    if weights is None or len(weights) != len(value):
        got = "none" if weights is None else str(len(weights))
        raise ValueError(
            f"the judge returns {len(value)} numbers per answer and judge_weights has {got}; give "
            "one factor per objective."
        )
    return math.fsum(w * x for w, x in zip(weights, value, strict=True))


def _texts(
    given: Sequence[Answer], report: OnlineReport, keep_unfinished: bool, distinct: bool
) -> list[str]:
    """The answers to one prompt that can be trained on; the report counts the others."""
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
    return kept
