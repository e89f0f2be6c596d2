"""Who scores stored answers: a function, a reward model, one model against another, a model's
likelihood. A score is a number, or a list of them where a function or model gives several."""

from __future__ import annotations

import math
import numbers
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...integrations import hf
from ...prep.cells import Text
from .. import models, pairing
from ..config import TrainConfig
from ..recipes.answer_logps import answer_logps
from ..recipes.online.judges import Scorer
from .options import SampleConfig, ScoreConfig
from .reward_model import RewardScores
from .source import Answers

Score = float | list[float] | None  # None: the answer cannot be read by the model
# (the rows, the answers of each) -> their scores
Scores = Callable[[Sequence[dict[str, Any]], Sequence[Answers]], list[list[Score]]]


def open_scorer(
    config: ScoreConfig | SampleConfig, device: torch.device, function: Scorer | None
) -> Scores:
    """The scorer that the options name, its models loaded; `function` is that of `judge`."""
    if function is not None:
        return by_function(function, str(config.judge))
    if config.judge_model is not None:
        settings = config.training(config.judge_model)
        return by_model(RewardScores(config.judge_model, settings, device), config.judge_model)
    assert isinstance(config, ScoreConfig)
    return by_logps(config, device)


def by_function(function: Scorer, name: str) -> Scores:
    """Asks a function row by row; whatever it raises is told with the row."""

    def scores(rows: Sequence[dict[str, Any]], answers: Sequence[Answers]) -> list[list[Score]]:
        found = []
        for row, own in zip(rows, answers, strict=True):
            texts = [plain(text) for text in own.texts]
            try:
                values: Any = function(row, texts) if texts else []
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(f"judge {name} failed: {reason}.") from error
            found.append(checked(f"judge {name}", values, len(texts)))
        return found

    return scores


def by_model(reward: RewardScores, name: str) -> Scores:
    """A reward model over whole conversations."""

    def scores(rows: Sequence[dict[str, Any]], answers: Sequence[Answers]) -> list[list[Score]]:
        flat = [
            (row | {"prompt": prompt}, text)
            for row, own in zip(rows, answers, strict=True)
            for prompt, text in zip(own.prompts, own.texts, strict=True)
        ]
        values = iter(reward([row for row, _ in flat], [text for _, text in flat]))
        return [
            checked(f"judge_model {name}", [next(values) for _ in own.texts], len(own.texts))
            for own in answers
        ]

    return scores


def by_logps(config: ScoreConfig, device: torch.device) -> Scores:
    """beta log(model / reference) of whole answers, or the mean log-probability per token, which is
    a mean over the models."""
    opened = [_open(config, name, device) for name in config.model]
    reference = None
    if config.ref_model is not None:
        reference, _, _ = _open(config, config.ref_model, device)
        pairing.check_pairing(config.ref_model, reference, opened[0][0])
        _check_same_tokens(opened[0][1], config.model[0], config.ref_model)
    said: set[str] = set()

    def scores(rows: Sequence[dict[str, Any]], answers: Sequence[Answers]) -> list[list[Score]]:
        prompts = [
            row | {"prompt": prompt}
            for row, own in zip(rows, answers, strict=True)
            for prompt in own.prompts
        ]
        texts = [text for own in answers for text in own.texts]
        why: Counter[str] = Counter()
        found = [answer_logps(*model[:2], prompts, texts, model[2], told=why) for model in opened]
        for name, own in zip(config.model, found, strict=True):
            _check_finite(f"model {name}", own)
        for kind in why.keys() - said:
            said.add(kind)
            print(f"answers without a score: {kind}", file=sys.stderr)
        if reference is not None:
            _, tokenizer, settings = opened[0]
            other = answer_logps(reference, tokenizer, prompts, texts, settings)
            _check_finite(f"ref_model {config.ref_model}", other)
            pairs = zip(found[0], other, strict=True)
            values = [_implicit(config.beta, one, two) for one, two in pairs]
        else:
            values = [_mean(per_model) for per_model in zip(*found, strict=True)]
        each, who = iter(values), " and ".join(config.model)
        return [
            checked(f"model {who}", [next(each) for _ in own.texts], len(own.texts))
            for own in answers
        ]

    return scores


def _open(
    config: ScoreConfig, name: str, device: torch.device
) -> tuple[hf.Model, Any, TrainConfig]:
    settings = config.training(name, append_eos=config.append_eos)
    tokenizer = models.load_tokenizer(name)
    model = models.freeze(models.load_model(name, settings)).to(device)
    context = models.context_length(model)
    if context is not None and context < config.max_length:
        raise ValueError(
            f"max_length must not pass the context of {name}, {context} tokens, got "
            f"{config.max_length}; lower max_length."
        )
    return model, tokenizer, settings


def _check_same_tokens(own: Any, name: str, other: str) -> None:
    """Refuses a reference whose tokenizer has other tokens at the same ids."""
    try:
        theirs = models.load_tokenizer(other).get_vocab()
    except ValueError:
        return  # a folder of weights alone: there is nothing to compare
    mine = own.get_vocab()
    if mine != theirs:
        unlike = next(t for t in sorted({*mine, *theirs}) if mine.get(t) != theirs.get(t))
        raise ValueError(
            f"the tokenizers of {name} and {other} differ ({unlike!r} is id {mine.get(unlike)} in "
            f"the one and {theirs.get(unlike)} in the other); both models must read the same "
            "tokens."
        )


def _check_finite(who: str, found: Sequence[Tensor | None]) -> None:
    for logp in found:
        if logp is not None and not bool(logp.isfinite().all()):
            raise ValueError(
                f"{who} gives log-probabilities that are not finite; check its weights."
            )


def _implicit(beta: float, policy: Tensor | None, reference: Tensor | None) -> float | None:
    if policy is None or reference is None:
        return None
    return beta * float((policy.double() - reference.double()).sum())


def _mean(per_model: Sequence[Tensor | None]) -> float | None:
    there = [logp for logp in per_model if logp is not None]
    if len(there) < len(per_model):
        return None
    return math.fsum(float(logp.double().mean()) for logp in there) / len(there)


def plain(text: Text) -> Any:
    """An answer as a function is given it: its text, or its messages where they are several."""
    if isinstance(text, str):
        return text
    lone = len(text) == 1 and isinstance(text[0].get("content"), str)
    return text[0]["content"] if lone and not text[0].get("tool_calls") else text


def checked(who: str, values: Any, count: int) -> list[Score]:
    """One finite number, or list of finite numbers, per answer.

    Raises:
        ValueError: another shape, a value that is no finite number.
    """
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple) or len(values) != count:
        shown = f"{values!r}"
        shown = shown if len(shown) < 80 else f"{shown[:80]}..."
        raise ValueError(f"{who} must give one score per answer ({count}), got {shown}.")
    return [None if value is None else _score(who, value) for value in values]


def _score(who: str, value: Any) -> float | list[float]:
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        value = value.tolist()
    parts = list(value) if isinstance(value, list | tuple) else [value]
    for part in parts:
        real = isinstance(part, numbers.Real) and not isinstance(part, bool)
        if not real or not math.isfinite(part):
            raise ValueError(f"{who} must give finite numbers, got {part!r}.")
    if not parts:
        raise ValueError(f"{who} must give finite numbers, got an empty list.")
    return [float(part) for part in parts] if isinstance(value, list | tuple) else float(value)
