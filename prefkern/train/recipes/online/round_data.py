"""The data of one online round: prompts answered by the policy, judged, made into rows."""

from __future__ import annotations

from collections.abc import Sequence
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
from .rows import Models, RowMaker


@dataclass(frozen=True)
class Start:
    """What a round starts from."""

    number: int  # of the round, from 0
    model: str
    reference: str | None  # None: the model itself with its adapter, if any, switched off


def make_round(
    config: TrainConfig,
    prompts: Sequence[dict[str, Any]],
    start: Start,
    maker: RowMaker,
    accelerator: Any,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of a round and what to log of it; both empty but on the main process.

    Raises:
        ValueError: no prompt that can be answered, no answer that can be trained on.
    """
    tokenizer = models.load_tokenizer(start.model)
    policy = models.load_model(start.model, config).to(accelerator.device).eval()

    def other(name: str) -> hf.Model:
        return models.freeze(models.load_model(name, config)).to(accelerator.device)

    reads = "reference" in maker.reads or config.generation_mixture > 0.0
    switched_off = start.reference is None and hasattr(policy, "peft_config")
    reference = other(start.reference or start.model) if reads and not switched_off else None
    rows = prompts_of_round(config, prompts, start.number)
    rows = with_room(rows, tokenizer, policy, config)
    answers = sample(config, rows, start.number, policy, tokenizer, reference, accelerator)
    if not accelerator.is_main_process:
        return [], {}
    lists, report = judged_lists(
        rows, answers, make_judge(config, policy, tokenizer, other, accelerator.device),
        keep_unfinished=config.keep_unfinished, least=maker.least, distinct=maker.distinct,
    )  # fmt: skip
    print(f"round {start.number + 1}: {report}")
    reads_aux = "aux" in maker.reads and config.aux_model is not None
    scored_by = Models(
        config=config, tokenizer=tokenizer, policy=policy, reference=reference,
        off=policy.disable_adapter if hasattr(policy, "peft_config") else None,
        aux=other(str(config.aux_model)) if reads_aux else None,
        value=_value_head(start.model, policy, maker),
    )  # fmt: skip
    table = maker.rows(lists, scored_by)
    counts = {name.replace(" ", "_"): n for name, n in report.counts.items()}
    return table, {
        "score": report.score, "rows": len(table), **maker.facts(table), **counts,
    }  # fmt: skip


def _value_head(folder: str, policy: hf.Model, maker: RowMaker) -> ValueHead | None:
    """The value head that a run left beside the policy, where the rows are made with one."""
    if "values" not in maker.reads or not (Path(folder) / value_head.FILE).is_file():
        return None
    return value_head.build(folder, policy).to(next(policy.parameters()).device)


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
            raise ValueError(f"row {number} of {config.dataset} has no prompt to sample from.")
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
        return judges.scorer_judge(judges.RewardModel(config.judge_model, config, device))
    return judges.scorer_judge(judges.load_scorer(str(config.judge)), str(config.judge))
