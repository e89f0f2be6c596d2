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


@dataclass
class OnlineReport:
    """What became of the sampled answers."""

    counts: Counter[str] = field(default_factory=Counter)
    score: float = math.nan  # mean over the answers that were judged

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
) -> tuple[list[dict[str, Any]], OnlineReport]:
    """One row per prompt with `completions`, `scores` and the prompt.

    Left out are answers that were cut off (unless `keep_unfinished`), blank ones, repeated ones (if
    `distinct`) and those the judge scores -inf; and prompts with fewer than `least` answers left.

    Raises:
        ValueError: nothing is left; the judge's own errors.
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
    out, total = [], []
    for (row, texts), values in zip(kept, scores, strict=True):
        good = [(t, s) for t, s in zip(texts, values, strict=True) if s != -math.inf]
        report.counts["unusable"] += len(texts) - len(good)
        if len(good) < least:
            report.counts["prompts without enough answers"] += 1
            continue
        total += [s for _, s in good]
        texts = [as_completion(row, text) for text, _ in good]
        out.append(training_row(row) | {"completions": texts, "scores": [s for _, s in good]})
    if not out:
        raise ValueError(
            f"no prompt has {least} answers to train on ({report}); raise max_new_tokens or "
            "num_generations, or set keep_unfinished."
        )
    report.counts["prompts"] = len(out)
    report.score = math.fsum(total) / len(total)
    return out, report


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
