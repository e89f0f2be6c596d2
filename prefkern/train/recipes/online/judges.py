"""Who scores sampled answers: the user's function, a reward model, or the policy itself."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....integrations import hf
from ... import models
from ...config import TrainConfig
from ...stored.reward_model import conversation_ids, load_reward_model
from ..answer_logps import Prompt, answer_logps

Scores = list[float] | list[list[float]]  # of the answers to a prompt: a number each, or several
# (row of the prompts' table, the texts of its answers) -> their scores
Scorer = Callable[[Prompt, list[str]], Sequence[float] | Sequence[Sequence[float]]]
# (rows, the texts of the answers to each) -> scores, alike
Judge = Callable[[Sequence[Prompt], list[list[str]]], list[Scores]]


def load_scorer(path: str) -> Scorer:
    """The function named by module:function or file.py:function.

    Raises:
        ValueError: not of that form, no such module, file or function, a module that fails.
    """
    where, sign, name = path.rpartition(":")
    if not sign or not name or not where:
        raise ValueError(f"judge must be module:function or file.py:function, got {path!r}.")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"judge: there is no file {where}.")
        spec = importlib.util.spec_from_file_location(f"judge_of_{Path(where).stem}", where)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look their annotations up
        with _told(where):
            spec.loader.exec_module(module)
    else:
        try:
            with _told(where):
                module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"judge: no module {error.name!r} on the import path; add its folder to PYTHONPATH "
                "or write file.py:function."
            ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"judge: {where} has no function {name!r}.")
    return found


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Whatever a module of the user's raises or leaves with, in one line; that it is not there
    itself is told by the caller."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and where.startswith(str(error.name)):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"judge: {where} cannot be loaded: {reason}.") from error


def _asked(scorer: Scorer, name: str, row: Prompt, answers: list[str]) -> Any:
    try:
        return scorer(row, answers)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        prompt = repr(row.get("prompt"))[:80]
        who = name if name.startswith("judge") else f"judge {name}"
        raise ValueError(f"{who} failed on the prompt {prompt}: {reason}.") from error


def scorer_judge(scorer: Scorer, name: str = "judge") -> Judge:
    """A judge that asks `scorer` row by row and checks what it returns."""

    def judge(rows: Sequence[Prompt], answers: list[list[str]]) -> list[Scores]:
        found = [
            _checked(name, _asked(scorer, name, r, list(a)), len(a))
            for r, a in zip(rows, answers, strict=True)
        ]
        widths = {len(x) if isinstance(x, list) else 0 for values in found for x in values}
        if len(widths) > 1:
            counts = ", ".join("one number" if not n else f"a list of {n}" for n in sorted(widths))
            raise ValueError(f"{name} must return as many numbers for every answer, got {counts}.")
        return found

    return judge


def no_judge(rows: Sequence[Prompt], answers: list[list[str]]) -> list[Scores]:
    """For losses that compare samples with something else than each other."""
    return [[0.0] * len(texts) for texts in answers]


def _checked(name: str, values: Any, count: int) -> Scores:
    values = _plain(values)
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(
            f"{name} must return one number per answer ({count}), or one list of numbers, got "
            f"{values!r}."
        )
    many = [_plain(value) for value in values]
    found = [
        [_number(name, x) for x in value] if isinstance(value, list) else _number(name, value)
        for value in many
    ]
    if any(value == [] for value in found):
        raise ValueError(f"{name} must return at least one number per answer, got an empty list.")
    return found  # type: ignore[return-value]  # alike, which the judge checks over all rows


def _plain(values: Any) -> Any:
    """Tensors, arrays and tuples as lists."""
    if isinstance(values, Tensor) or hasattr(values, "tolist"):
        values = values.tolist()
    return list(values) if isinstance(values, tuple) else values


def _number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must return finite numbers, got {value!r}.")
    return float(value)


class RewardModel:
    """A sequence-classification model as a scorer of whole conversations: its one output, or one
    per objective where config.judge_weights says how they count."""

    def __init__(self, name: str, config: TrainConfig, device: torch.device) -> None:
        self.tokenizer = models.load_tokenizer(name)
        plain = dataclasses.replace(config, attn_implementation=None)
        model = load_reward_model(name, plain)
        outputs, weights = model.config.num_labels, config.judge_weights
        if outputs != (1 if weights is None else len(weights)):
            raise ValueError(
                f"judge_model {name} has {outputs} output(s) and judge_weights "
                f"{'is not given' if weights is None else f'has {len(weights)} factors'}: a model "
                "with several outputs needs one factor each."
            )
        self.several = weights is not None
        self.model = models.freeze(model).to(device)

    @torch.no_grad()
    def __call__(self, row: Prompt, answers: list[str]) -> Scores:
        scores: list[Any] = []
        for answer in answers:  # one by one: no padding token and no padded position is needed
            ids = torch.tensor([self._ids(row, answer)], device=self.model.device)
            outputs = self.model(input_ids=ids).logits[0].tolist()
            scores.append(outputs if self.several else outputs[0])
        return scores

    def _ids(self, row: Prompt, answer: str) -> list[int]:
        return conversation_ids(self.tokenizer, self.model, row, answer)


def implicit_judge(
    policy: hf.Model, reference: hf.Model, tokenizer: Any, config: TrainConfig
) -> Judge:
    """The policy's own reward, beta (log policy - log reference) summed over the answer.

    As Selfie labels its samples (arXiv 2406.04412). An answer that cannot be tokenised for
    training scores -inf and is left out by the caller.
    """
    beta = float(config.loss_args.get("beta", 0.1))

    def judge(rows: Sequence[Prompt], answers: list[list[str]]) -> list[Scores]:
        flat = [(row, text) for row, texts in zip(rows, answers, strict=True) for text in texts]
        table, texts = [row for row, _ in flat], [text for _, text in flat]
        scores = []
        for one, other in zip(
            answer_logps(policy, tokenizer, table, texts, config),
            answer_logps(reference, tokenizer, table, texts, config),
            strict=True,
        ):
            if one is None or other is None:
                scores.append(-math.inf)
            else:
                scores.append(beta * float((one - other).double().sum()))
        values = iter(scores)
        return [[next(values) for _ in texts] for texts in answers]

    return judge
