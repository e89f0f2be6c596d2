"""The data of one online round: prompts answered by the policy, judged, made into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....integrations import hf
from ... import models
from ...config import TrainConfig
from .. import value_head
from ..value_head import ValueHead
from . import judges, sampling
from .answers import judged_lists
from .rows import RoundModels, RowMaker


@dataclass(frozen=True)
class Start:
    """What a round starts from."""

    number: int  # of the round, from 0
    model: str
    reference: str | None  # None: the model itself with its adapter, if any, switched off


@dataclass
class Sampler:
    """Prompts answered by a policy, judged, and made into rows."""

    config: TrainConfig
    prompts: Sequence[dict[str, Any]]
    maker: RowMaker
    models: RoundModels
    accelerator: Any
    load: Callable[[str], hf.Model]  # a further frozen model
    judge: judges.Judge | None = None  # made at the first use, on the main process

    def rows(self, number: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The rows of the sampling of that number and what to log of them; both empty but on the
        main process.

        Raises:
            NothingToTrain: no answer that can be trained on.
            ValueError: no prompt that can be answered, a judge that does not judge.
        """
        config, maker, here = self.config, self.maker, self.models
        rows = prompts_of_round(config, self.prompts, number)
        for i, row in enumerate(rows):
            if lacking := [name for name in maker.keeps if not row.get(name)]:
                raise ValueError(
                    f"row {i} of {config.dataset} has no {' and no '.join(lacking)}, which loss "
                    f"{', '.join(config.loss)} reads beside its samples."
                )
        rows = with_room(rows, here.tokenizer, here.policy, config)
        answers = sample(
            config, rows, number, here.policy, here.tokenizer, here.reference, self.accelerator
        )
        if not self.accelerator.is_main_process:
            return [], {}
        if not maker.judged:
            self.judge = judges.no_judge
        if self.judge is None:
            self.judge = make_judge(
                config, here.policy, here.tokenizer, self.load, self.accelerator.device
            )
        lists, report = judged_lists(
            rows, answers, self.judge,
            keep_unfinished=config.keep_unfinished, least=maker.least, distinct=maker.distinct,
            weights=config.judge_weights, keeps=maker.keeps,
        )  # fmt: skip
        print(f"sampling {number + 1}: {report}")
        table = maker.rows(lists, here)
        scored = {"score": report.score} if maker.judged else {}
        parts = {f"objective_{i}": x for i, x in enumerate(report.objectives, 1)}
        counts = {name.replace(" ", "_"): n for name, n in report.counts.items()}
        return table, {**scored, **parts, "rows": len(table), **maker.facts(table), **counts}


def make_sampler(
    config: TrainConfig,
    prompts: Sequence[dict[str, Any]],
    start: Start,
    maker: RowMaker,
    accelerator: Any,
    *,
    policy: hf.Model = None,
    tokenizer: Any = None,
    reference: hf.Model = None,
    value: ValueHead | None = None,
) -> Sampler:
    """A sampler of the model that a round starts from, or of a `policy` that is being trained, with
    the tokenizer, reference and value head of its run."""
    if policy is None:
        policy = models.load_model(start.model, config).to(accelerator.device).eval()
        value = _value_head(start.model, policy, maker)

    def other(name: str) -> hf.Model:
        return models.freeze(models.load_model(name, config)).to(accelerator.device)

    reads = "reference" in maker.reads or config.generation_mixture > 0.0
    switched_off = start.reference is None and hasattr(policy, "peft_config")
    if reads and not switched_off and reference is None:
        reference = other(start.reference or start.model)
    reads_aux = "aux" in maker.reads and config.aux_model is not None
    here = RoundModels(
        config=config, tokenizer=tokenizer or models.load_tokenizer(start.model), policy=policy,
        reference=reference if reads and not switched_off else None,
        off=policy.disable_adapter if hasattr(policy, "peft_config") else None,
        aux=other(str(config.aux_model)) if reads_aux else None, value=value,
    )  # fmt: skip
    return Sampler(config, prompts, maker, here, accelerator, other)


def _value_head(folder: str, policy: hf.Model, maker: RowMaker) -> ValueHead | None:
    """The value head that a run left beside the policy, where the rows are made with one."""
    if "values" not in maker.reads or not (Path(folder) / value_head.FILE).is_file():
        return None
    return value_head.build_head(folder, policy).to(next(policy.parameters()).device)


def prompts_of_round(
    config: TrainConfig, prompts: Sequence[dict[str, Any]], number: int
) -> list[dict[str, Any]]:
    """prompts_per_round of them, each round the next ones, from the start again at the end."""
    count = config.prompts_per_round
    if count is None:
        return list(prompts)
    return [prompts[(number * count + i) % len(prompts)] for i in range(count)]


def with_room(
    rows: list[dict[str, Any]], tokenizer: Any, policy: hf.Model, config: TrainConfig
) -> list[dict[str, Any]]:
    """Rows whose prompt leaves room for max_new_tokens within max_length."""
    room = min(config.max_length, models.context_length(policy) or config.max_length)
    found = []
    for number, row in enumerate(rows):
        if not row.get("prompt"):
            columns = ", ".join(map(repr, row)) or "none"
            raise ValueError(
                f"row {number} of {config.dataset} has no prompt to sample from (its columns: "
                f"{columns}); --column prompt=NAME reads another column."
            )
        # one more: the end that training appends
        if len(sampling.prompt_ids(tokenizer, row)) + config.max_new_tokens < room:
            found.append(row)
    if not found:
        raise ValueError(
            f"no prompt of {config.dataset} leaves room for max_new_tokens="
            f"{config.max_new_tokens} within {room} tokens; lower max_new_tokens or raise "
            "max_length."
        )
    return found


def sample(
    config: TrainConfig,
    rows: list[dict[str, Any]],
    number: int,
    policy: hf.Model,
    tokenizer: Any,
    reference: hf.Model | None,
    accelerator: Any,
) -> list[list[sampling.Answer]]:
    """Answers to every row, each process answering its share; every process gets all."""
    rank, world = accelerator.process_index, accelerator.num_processes
    answers = sampling.sample_answers(
        policy, tokenizer, rows[rank::world],
        num_generations=config.num_generations, max_new_tokens=config.max_new_tokens,
        seed=config.seed + 1000 * number + rank,
        temperature=config.generation_temperature, top_p=config.generation_top_p,
        batch_size=config.generation_batch_size, reference=reference,
        mixture=config.generation_mixture,
    )  # fmt: skip
    if world == 1:
        return answers
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, answers)
    return [everyone[i % world][i // world] for i in range(len(rows))]


def make_judge(
    config: TrainConfig, policy: hf.Model, tokenizer: Any, load: Any, device: torch.device
) -> judges.Judge:
    """The judge that the options name; `load` reads a further frozen model."""
    if config.judge == "implicit":
        reference = load(str(config.judge_ref_model))
        return judges.implicit_judge(policy, reference, tokenizer, config)
    if config.judge_model is not None:
        reward = judges.RewardModel(config.judge_model, config, device)
        return judges.scorer_judge(reward, f"judge_model {config.judge_model}")
    return judges.scorer_judge(judges.load_scorer(str(config.judge)), str(config.judge))
