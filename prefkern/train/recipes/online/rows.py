"""What judged lists become: one maker of rows for each kind that a loss trains on.

Answers pass as text and are tokenised again with their prompt, as any data set is; where a model
spelled a word in other pieces than the tokenizer does (2 of 128 answers of a 260K story model), it
is trained on the tokenizer's, and log-probabilities are of those too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .... import losses
from ....integrations import hf
from ....losses.record import Loss
from ....prep import pairs_from_lists
from ...config import TrainConfig
from ..answer_logps import answer_logps
from ..value_head import ValueHead, token_values
from .answers import NothingToTrain

Lists = list[dict[str, Any]]  # rows of `judged_lists`
PER_ANSWER = ("completions", "scores", "objectives")  # columns of theirs with an entry per answer


@dataclass(frozen=True)
class RoundModels:
    """The models of a round, by which makers score the answers."""

    config: TrainConfig
    tokenizer: Any
    policy: hf.Model
    reference: hf.Model = None  # None: the policy in the context `off`
    off: Callable[[], AbstractContextManager] | None = None  # switches the policy's adapter off
    aux: hf.Model = None
    value: ValueHead | None = None  # of the policy

    def logps(self, lists: Lists, *names: str) -> tuple[Lists, list[list[Tensor]]]:
        """Per model ("policy", "reference", "aux") the log-probabilities [t] of every answer, in
        order; and the lists without the answers that one of the models cannot read."""
        return _usable(lists, *(self._read(lists, name) for name in names))

    def values(self, lists: Lists) -> list[Tensor]:
        """The value [t] at the state before every token of every answer, in order: 0 where the
        policy has no value head yet. The answers are those that `logps` left."""
        if self.value is None:
            return [torch.zeros_like(x) for x in self._read(lists, "policy") if x is not None]
        read = partial(token_values, self.value)
        return [x for x in self._read(lists, "policy", read=read) if x is not None]

    def _read(self, lists: Lists, name: str, **options: Any) -> list[Tensor | None]:
        texts = [_text(text) for row in lists for text in row["completions"]]
        rows = [row for row in lists for _ in row["completions"]]
        model, off = self._of(name)
        return answer_logps(model, self.tokenizer, rows, texts, self.config, off=off, **options)

    def _of(self, name: str) -> tuple[hf.Model, Callable[[], AbstractContextManager]]:
        model = getattr(self, name)
        if model is None and name == "reference" and self.off is not None:
            return self.policy, self.off
        if model is None:
            raise ValueError(
                f"loss {', '.join(self.config.loss)} needs a {name} model to score samples against."
            )
        return model, nullcontext


class RowMaker:
    """How the rows of one kind of loss are made."""

    name: ClassVar[str]  # for --dry-run
    makes: ClassVar[tuple[str, ...]] = ()  # tensors of losses that its rows can hold
    columns: ClassVar[tuple[str, ...]] = ()  # those among them that are optional and always there
    least: ClassVar[int] = 2  # answers that a prompt must have
    distinct: ClassVar[bool] = True  # whether a repeated answer is left out
    reads: ClassVar[tuple[str, ...]] = ()  # models beside the policy
    takes: ClassVar[tuple[str, ...]] = ()  # those of config.loss_args that make the rows
    judged: ClassVar[bool] = True  # whether the answers are compared by a judge's scores
    keeps: ClassVar[tuple[str, ...]] = ()  # columns of the prompts that the rows have too

    def __init__(self, config: TrainConfig, records: Sequence[Loss]) -> None:
        self.config, self.records = config, records

    @classmethod
    def serves(cls, record: Loss) -> bool:
        """Whether its rows are those that the loss trains on."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ValueError for values of `takes` that are no numbers >= 0."""
        for name in self.takes:
            value = self.config.loss_args.get(name, 0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ValueError(
                    f"loss_args: {name} must be a number >= 0, got {value!r}; write --loss-arg "
                    f"{name}=VALUE."
                )

    def given(self, *names: str) -> dict[str, Any]:
        """Those of config.loss_args that have these names."""
        return {k: v for k, v in self.config.loss_args.items() if k in names}

    def rows(self, lists: Lists, models: RoundModels) -> list[dict[str, Any]]:
        raise NotImplementedError

    def facts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Numbers over all the rows of a round, logged with the round."""
        return {}

    def loss_args(self, facts: Mapping[str, float]) -> dict[str, Any]:
        """Hyper-parameters of the round that follow from its facts."""
        return {}


class PairRows(RowMaker):
    """Pairs of answers with different scores, and the judge's probability where it is read."""

    name = "pairs"
    makes = ("pref_prob", "preference_prob")

    @classmethod
    def serves(cls, record: Loss) -> bool:
        return record.family == "pairwise" and len(record.rows) == 2

    def rows(self, lists: Lists, models: RoundModels) -> list[dict[str, Any]]:
        needs = any("pref_prob" in losses.required(record) for record in self.records)
        name = "preference_prob" if self.config.soft_judge else "pref_prob" if needs else None
        return pair_rows(lists, pairs=self.config.online_pairs, probability=name)


class ListRows(RowMaker):
    """The lists themselves, with soft pairs where the loss reads pairs."""

    name = "lists"
    makes = ("pairs", "pref_prob")

    @classmethod
    def serves(cls, record: Loss) -> bool:
        return record.family == "listwise"

    def rows(self, lists: Lists, models: RoundModels) -> list[dict[str, Any]]:
        ranked = _ranked(lists)
        if any("pairs" in losses.required(record) for record in self.records):
            return [row | soft_pair_columns(row["scores"]) for row in ranked]
        return ranked


class RewardRows(RowMaker):
    """Answers and their scores, as whole trajectories with a reward at the end (OREO)."""

    name = "rewards"
    makes = ("reward",)
    least, distinct = 1, False

    @classmethod
    def serves(cls, record: Loss) -> bool:
        return "reward" in losses.required(record)

    def rows(self, lists: Lists, models: RoundModels) -> list[dict[str, Any]]:
        return single_rows(lists, {"reward": [s for row in lists for s in row["scores"]]})


class BestRows(RowMaker):
    """The best answer to every prompt, for losses that imitate it and read no other."""

    name = "best answers"
    least = 1

    @classmethod
    def serves(cls, record: Loss) -> bool:
        return record.alone

    def rows(self, lists: Lists, models: RoundModels) -> list[dict[str, Any]]:
        places = [row["scores"].index(max(row["scores"])) for row in lists]
        return [
            _rest(row) | {"completion": row["completions"][i], "score": row["scores"][i]}
            for row, i in zip(lists, places, strict=True)
        ]


class LevelRows(RowMaker):
    """Lists of draws by preference level: the judge returns whole numbers from 1, the best."""

    name = "levels"
    makes = ("preference_levels", "old_logp")
    columns = ("old_logp",)
    distinct = False

    @classmethod
    def serves(cls, record: Loss) -> bool:
        return "preference_levels" in losses.required(record)

    def rows(self, lists: Lists, models: RoundModels) -> list[dict[str, Any]]:
        for level in (level for row in lists for level in row["scores"]):
            if level < 1 or level != int(level):
                raise ValueError(
                    f"loss {self.records[0].name!r} reads preference levels: the judge must return "
                    f"whole numbers from 1 (the best), got {level:g}."
                )
        lists, (own,) = models.logps(lists, "policy")
        logps = iter(own)
        every = [
            row
            | {
                "preference_levels": row["scores"],
                "scores": [-level for level in row["scores"]],
                "old_logp": [next(logps).tolist() for _ in row["completions"]],
            }
            for row in lists
        ]
        return _ranked(every)


class NegativeRows(RowMaker):
    """Samples of the policy beside the prompt's stored bad answer, in one list (D2O)."""

    name = "samples and a stored answer"
    least, distinct = 1, False
    judged, keeps = False, ("rejected",)

    @classmethod
    def serves(cls, record: Loss) -> bool:
        return record.name == "d2o_list"

    def rows(self, lists: Lists, models: RoundModels) -> list[dict[str, Any]]:
        out = []
        for row in lists:
            bad = row["rejected"]
            samples = [text for text in row["completions"] if text != bad]
            if samples:
                scores = [1.0] * len(samples) + [0.0]
                out.append(_rest(row) | {"completions": [*samples, bad], "scores": scores})
        if not out:
            raise NothingToTrain("every sample is the stored rejected answer of its prompt.")
        return [{k: v for k, v in row.items() if k != "rejected"} for row in out]


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
    usable = [
        {name: value for name, value in row.items() if name != "objectives"}
        for row in lists
        if min(row["scores"]) < max(row["scores"])
    ]
    if not usable:
        raise NothingToTrain(
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


def single_rows(lists: Lists, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """One row per answer, with its entry of every column."""
    out, at = [], 0
    for row in lists:
        rest = _rest(row)
        for text in row["completions"]:
            out.append(
                rest | {"completion": text} | {name: column[at] for name, column in columns.items()}
            )
            at += 1
    return out


def _rest(row: Mapping[str, Any]) -> dict[str, Any]:
    """A list's row without its answers and what is said of each."""
    return {name: value for name, value in row.items() if name not in PER_ANSWER}


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
                    for name in PER_ANSWER
                    if name in row
                }
            )
    picked = [[x for x, ok in zip(c, good, strict=True) if ok and x is not None] for c in columns]
    return kept, picked


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer[0]["content"]
