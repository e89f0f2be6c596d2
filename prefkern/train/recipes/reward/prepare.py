"""A run of a reward model before its first step: as run.prepare, without reference and packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils import logging

from ....losses.record import Loss
from ... import demands, facts
from ... import run as language
from ...config import TrainConfig
from ...data import Loaded, data_hash
from ...data_providers import Columns
from ...models import load_tokenizer
from ...optimizer import make_optimizer
from ...processes import Processes, make_accelerator
from ...providers import Opened, Provider, lacking_parts
from ...reference import Reference
from ...root import Root
from .model import load_reward_policy, settle
from .step import RewardStep, ScoreProvider


def prepare_reward(config: TrainConfig, *, training: bool) -> language.Run:
    """Loads and checks everything; raises as `run.prepare`."""
    records, providers = language.plan(config)
    accelerator = make_accelerator(config)
    language.check_sources(config)
    processes = Processes.of(accelerator)
    if accelerator.is_fsdp2 or processes.tensor_parallel > 1:
        raise ValueError(
            "head='reward': a reward model is trained whole, on one process or with "
            "DistributedDataParallel; set distributed_type: MULTI_GPU in accelerate's file."
        )
    resume, notes = (
        processes.from_main(partial(language.resume_point, config)) if training else (None, [])
    )
    tell = partial(language.say, accelerator)
    for note in (*notes, *lacking_parts(records, config, providers)):
        tell(note)
    tokenizer, policy, pad_id = _open_policy(config, providers, resume, training, tell)
    for provider in providers:
        provider.on_policy(policy, resume, processes.world)
    data, eval_data = language.open_data(config, providers, tokenizer, policy)
    data = as_lists(data, records)
    eval_data = None if eval_data is None else as_lists(eval_data, records)
    demands.check_layout(records, data.layout)
    own_hash = data_hash(data.examples, columns=True)
    held_out = None if eval_data is None else data_hash(eval_data.examples)
    processes.check_same(config, data=own_hash, eval_data=held_out)
    step = RewardStep(policy, config, data.layout, providers)
    root = Root(step)
    wrapped, optimizer = language.prepared(
        accelerator, root, make_optimizer(step, config), training
    )
    reference = Reference("none", config, policy=policy)
    opened = Opened(
        policy=policy, reference=reference, examples=data.examples, packed=False, pad_id=pad_id,
        device=accelerator.device, processes=processes, training=training, resume=resume,
        say=tell, frozen=_no_other,
    )  # fmt: skip
    for provider in providers:
        provider.open(opened)
    found = _facts(step, providers, data, eval_data)
    return language.Run(
        config=config, records=records, accelerator=accelerator, processes=processes,
        tokenizer=tokenizer, step=step, root=root, wrapped=wrapped, optimizer=optimizer,
        reference=reference, packed=False, data=data, eval_data=eval_data,
        data_hash=own_hash, resume=resume, facts=found,
    )  # fmt: skip


def _open_policy(
    config: TrainConfig,
    providers: Sequence[Provider],
    resume: Path | None,
    training: bool,
    tell: Callable[[str], None],
) -> tuple[Any, Any, int]:
    """Tokenizer, model and the id that pads."""
    if config.disable_tqdm:
        logging.disable_progress_bar()
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    policy, drawn = load_reward_policy(config, resume)
    if drawn:
        if not training:
            raise ValueError(
                f"{config.model} has no scores ({', '.join(drawn)}): nothing to measure."
            )
        tell(f"{', '.join(drawn)} are drawn at random: {config.model} has no scores yet.")
    pad_id = language.pad_id(tokenizer, policy)
    settle(policy, tokenizer, pad_id, config.append_eos)
    if not any(isinstance(p, ScoreProvider) and p.makes_scores for p in providers):
        _check_outputs(config, policy)
    return tokenizer, policy, pad_id


def _facts(
    step: RewardStep, providers: Sequence[Provider], data: Loaded, eval_data: Loaded | None
) -> dict[str, Any]:
    """What --dry-run shows."""
    parameters = list(step.parameters())
    columns = [c for p in providers if isinstance(p, Columns) for c in p.columns.values()]
    return {
        "model": type(language.hf.causal_lm(step.policy)).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "outputs": language.hf.causal_lm(step.policy).config.num_labels,
        "layout": data.layout,
        "columns": {column.argument: column.column for column in columns},
        "data": facts.counts(data),
        "eval_data": None if eval_data is None else facts.counts(eval_data),
    }


def _check_outputs(config: TrainConfig, policy: Any) -> None:
    outputs, weights = policy.config.num_labels, config.output_weights
    if len(weights or (1.0,)) != outputs:
        raise ValueError(
            f"the model has {outputs} outputs: output_weights must have {outputs} numbers, whose "
            f"weighted sum is an answer's score, got {list(weights)}."
        )


def as_lists(data: Loaded, records: list[Loss]) -> Loaded:
    """Pairs as lists of two where the losses are of lists."""
    if data.layout != "pairs" or any(record.family != "listwise" for record in records):
        return data
    examples = [dataclasses.replace(e, relevance=(1.0, 0.0)) for e in data.examples]
    return data._replace(examples=examples, layout="lists")


def _no_other(name: str) -> Any:
    raise ValueError(f"a reward model stands beside no other model, got {name}.")
