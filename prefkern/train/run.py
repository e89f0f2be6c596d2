"""Everything a run needs before its first step: processes, models, data, and the checks on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..integrations import hf
from ..integrations.head import at_head
from ..losses.record import Loss
from . import demands, inputs, models, output, pairing, reference_cache, seals, sharded, zero
from .config import TrainConfig
from .data import Example, Loaded, Loader, SkipReport, collate, data_hash
from .data.read import check_source
from .data.unread import TEXTS
from .data_providers import Columns
from .facts import facts_of
from .models import autocast
from .optimizer import make_optimizer
from .processes import Processes, make_accelerator
from .providers import Micro, Opened, Provider, lacking_parts
from .recipes.table import idle_options, providers_of, vision_of
from .reference import CACHED, Reference, ReferenceRows, choose_mode
from .root import Root
from .step import PreferenceStep


@dataclass
class Run:
    """A prepared run. Examples are held by every process; batches are dealt out by rank."""

    config: TrainConfig
    records: list[Loss]
    accelerator: Any
    processes: Processes
    tokenizer: Any
    step: PreferenceStep
    root: Root  # the way into the policy, wherever its weights are
    wrapped: Any  # the root as accelerate wrapped it, for forwards with a backward
    optimizer: Any
    reference: Reference
    packed: bool
    data: Loaded
    eval_data: Loaded | None
    data_hash: str
    resume: Path | None
    facts: dict[str, Any]  # what --dry-run shows

    @property
    def providers(self) -> list[Provider]:
        return self.step.providers

    @property
    def layout(self) -> str:
        return self.data.layout

    @property
    def examples(self) -> list[Example]:
        return self.data.examples

    @property
    def report(self) -> SkipReport:
        return self.data.report

    @property
    def eval_examples(self) -> list[Example]:
        return [] if self.eval_data is None else self.eval_data.examples

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Which share of the micro-batches this process takes, of `world`."""
        return self.processes.rank

    @property
    def world(self) -> int:
        return self.processes.world

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all have in common."""
        return self.accelerator.is_main_process

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer, self.step.policy)

    def count_items(self, examples: list[Example]) -> dict[str, int]:
        """Denominators of `examples`, all of one step."""
        row, whole = demands.likelihood_row(self.records), self.config.likelihood_prompt
        return demands.count_items(examples, row, whole=whole)

    def micro_batch(self, examples: list[Example], *, real: bool = True) -> Micro:
        row = demands.whole_row(self.records, self.config)
        batch = collate(examples, packed=self.packed, pad_id=self.pad_id, whole_row=row)
        return Micro(examples, batch.to(self.device), real)

    @torch.no_grad()
    def constants(self, micro: Micro) -> tuple[ReferenceRows, dict[str, Any]]:
        """What a micro-batch needs beside the policy: the reference's part, the providers'."""
        reference, given = self.reference.rows(micro.batch), dict[str, Any]()
        with autocast(self.config, self.device.type):
            for provider in self.providers:
                given |= provider.arguments(micro, reference)
        if reference.states is not None:  # L hidden states: what is read of them was read
            reference.states = reference.states._replace(layers=None)
        return reference, given

    def say(self, text: str) -> None:
        say(self.accelerator, text)


def say(accelerator: Any, text: str) -> None:
    if accelerator.is_main_process:
        print(text, file=sys.stderr)


def pad_id(tokenizer: Any, model: hf.Model) -> int:
    """0 where the tokenizer has no pad token, or one that the embedding has no row for: masked
    positions are looked up and never read."""
    rows = zero.shape(hf.causal_lm(model).get_input_embeddings().weight)[0]
    found = tokenizer.pad_token_id
    return found if found is not None and found < rows else 0


def prepare(config: TrainConfig, *, training: bool = True) -> Run:
    """Loads and checks everything of a language model; the same for training, evaluation and a
    dry run (recipes.prepared has the way for every kind of model).

    Raises:
        ValueError: every mistake of the user's, with what to do.
    """
    if training and config.has_rounds:
        raise ValueError(
            "num_rounds, round_data: a run of rounds is started by prefkern.train.train."
        )
    records, providers = plan(config)
    accelerator = make_accelerator(config)
    check_sources(config)  # of this machine
    processes = Processes.of(accelerator)
    resume, notes = processes.from_main(partial(resume_point, config)) if training else (None, [])
    tell = partial(say, accelerator)
    unused = idle_options(config, providers) if training else []
    for note in (*notes, *lacking_parts(records, config, providers), *unused):
        tell(note)
    tokenizer, policy = open_policy(config, providers, resume, processes)
    mode = mode_of(config, providers, policy, training, tell)
    data, eval_data = open_data(config, providers, tokenizer, policy)
    demands.check_layout(records, data.layout)
    if not training:
        demands.check_compared(config, mode)
    own_hash = data_hash(data.examples, columns=True)
    held_out = None if eval_data is None else data_hash(eval_data.examples)
    processes.check_same(config, data=own_hash, eval_data=held_out)
    kind: Any = next((p.step_class for p in providers if p.step_class), PreferenceStep)
    step: PreferenceStep = kind(policy, config, data.layout, providers)
    root = Root(step)
    wrapped, optimizer = prepared(accelerator, root, make_optimizer(step, config), training)
    difference = pairing.check_own_logits(policy, config, root)
    pairing.check_noise(policy, data.examples, config, root)
    packed = pairing.choose_packing(tell, policy, data.examples, config, root)
    processes.check_same(config, packing=packed)
    data, eval_data = with_stored_reference(mode, config, processes, data, eval_data)
    frozen = partial(
        pairing.open_frozen, config=config, examples=data.examples, packed=packed, policy=policy,
        place=partial(sharded.place, accelerator),
    )  # fmt: skip
    reference = open_reference(mode, config, providers, policy, frozen, root)
    opened = Opened(
        policy=policy, reference=reference, examples=data.examples, packed=packed,
        pad_id=pad_id(tokenizer, policy), device=accelerator.device, processes=processes,
        training=training, resume=resume, say=tell, frozen=frozen,
    )  # fmt: skip
    for provider in providers:
        provider.open(opened)
        late = [name for name in provider.modules() if not hasattr(step, name)]
        assert not late, f"{late} must be there after on_policy, before the model is shared out"
    facts = facts_of(config, step, providers, mode, packed, difference, data, eval_data)
    return Run(
        config=config, records=records, accelerator=accelerator, processes=processes,
        tokenizer=tokenizer, step=step, root=root, wrapped=wrapped, optimizer=optimizer,
        reference=reference, packed=packed, data=data, eval_data=eval_data, data_hash=own_hash,
        resume=resume, facts=facts,
    )  # fmt: skip


def prepared(accelerator: Any, root: Root, optimizer: Any, training: bool) -> tuple[Any, Any]:
    """Root and optimizer as accelerate wraps them; an evaluation has no gradients, and takes no
    room for them where the model is whole."""
    if training and zero.stage_of(accelerator):
        zero.before(accelerator, root, optimizer, root.step.trained())
    if training or accelerator.is_fsdp2:
        return accelerator.prepare(root, optimizer)
    return sharded.place(accelerator, root), optimizer


def mode_of(
    config: TrainConfig,
    providers: Sequence[Provider],
    policy: hf.Model,
    training: bool,
    tell: Callable[[str], None],
) -> str:
    """Where the reference comes from, and a word where it is not the model as given."""
    given_adapter = models.is_adapter(config.model)
    mode = choose_mode(
        config,
        demands.ReferenceNeeds.of(config),
        has_adapter=hasattr(policy, "peft_config"),
        # an evaluated adapter is compared with its base, as when it was trained
        given_adapter=training and given_adapter,
        moves=any(provider.moves_reference for provider in providers),
        further=[p.wants_reference for p in providers if p.wants_reference],
    )
    if mode == "adapter" and given_adapter:
        tell(f"the reference is {models.adapter_base(config.model)}, without adapter.")
    return mode


def plan(config: TrainConfig) -> tuple[list[Loss], list[Provider]]:
    """Losses and providers of a run; what can be refused before anything loads is refused."""
    records = demands.losses_of(config)
    providers = providers_of(config, records)
    demands.calls_of(config)  # ranges of hyper-parameters
    demands.whole_row(records, config)
    return records, providers


def check_sources(config: TrainConfig) -> None:
    """Refuses names of models, data and files that lead nowhere, before one of them is loaded.

    Raises:
        ValueError: naming the option.
    """
    for option in inputs.MODELS:
        with _of_option(option):
            if (name := getattr(config, option)) is not None:
                models.check_name(name)
    for option in ("dataset", "eval_dataset"):
        with _of_option(option):
            if (source := getattr(config, option)) is not None:
                check_source(source)
    for option in inputs.STORED:
        value = getattr(config, option)
        for path in value if isinstance(value, tuple) else (value,):
            if path is not None and (not path or not Path(path).exists()):
                raise ValueError(
                    f"{option}: there is no {path!r}; `prefkern precompute` writes such files."
                )


@contextmanager
def _of_option(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def resume_point(config: TrainConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and what to say of it; the output folder is checked."""
    folder = Path(config.output_dir)
    inputs.check_inputs(config)
    resume, notes = seals.find_resume(config.resume_from_checkpoint, folder)
    output.check_free(
        folder,
        overwrite=config.overwrite_output_dir,
        resume=resume,
        auto=config.resume_from_checkpoint is not None,
    )
    return resume, notes


def open_policy(
    config: TrainConfig, providers: Sequence[Provider], resume: Path | None, processes: Processes
) -> tuple[Any, hf.Model]:
    """Tokenizer and policy."""
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    if config.disable_tqdm:
        transformers_logging.disable_progress_bar()
    set_seed(config.seed)
    tokenizer = models.load_tokenizer(config.model)
    policy = models.load_policy(config, resume, processes.tensor_parallel)
    for provider in providers:
        provider.on_policy(policy, resume, processes.world)
    at_head(policy)
    return tokenizer, policy


def make_loader(
    config: TrainConfig, tokenizer: Any, model: hf.Model, providers: Sequence[Provider] = ()
) -> Loader:
    """Reads data as the run's losses want them; without providers no column but the texts."""
    columns = next((p for p in providers if isinstance(p, Columns)), None)
    return Loader(
        tokenizer=tokenizer,
        layout=config.layout,
        max_length=config.max_length,
        model_context=models.context_length(model),
        vocab_size=hf.text_config(model).vocab_size,
        strict=config.strict, seed=config.seed,
        append_eos=config.append_eos, list_labels=config.list_labels,
        label_range=demands.label_range(config),
        renamed={k: v for k, v in config.columns.items() if k in TEXTS},
        score_prompt=config.score_prompt,
        columns=[] if columns is None else list(columns.columns.values()),
        roles={} if columns is None else columns.roles,
        labelled=columns is not None and columns.labelled,
        vision=vision_of(config, tokenizer),
        shuffle_lists=not any(provider.keeps_list_order for provider in providers),
    )  # fmt: skip


def open_data(
    config: TrainConfig, providers: Sequence[Provider], tokenizer: Any, policy: hf.Model
) -> tuple[Loaded, Loaded | None]:
    """The data of training and of evaluation."""
    loader = make_loader(config, tokenizer, policy, providers)

    def load(source: str, split: str, limit: int | None) -> Loaded:
        found = loader.load(source, split, limit)
        for provider in providers:
            found = found._replace(examples=provider.on_examples(found.examples))
        return found

    data = load(config.dataset, config.dataset_split, config.limit)
    if config.eval_dataset is None:
        return data, None
    with _of_option("eval_dataset"):
        eval_data = load(config.eval_dataset, config.eval_split, config.eval_limit)
    if eval_data.layout != data.layout:
        raise ValueError(
            f"dataset holds {data.layout}, eval_dataset holds {eval_data.layout}: they must match."
        )
    if eval_data.report.ordered != data.report.ordered:
        raise ValueError(
            "the labels of dataset and eval_dataset are on two scales, one of them beyond what the "
            "loss's gains are for; pass --list-labels order or --list-labels scores for both."
        )
    return data, eval_data


def with_stored_reference(
    mode: str, config: TrainConfig, processes: Processes, data: Loaded, eval_data: Loaded | None
) -> tuple[Loaded, Loaded | None]:
    """The data, with the log-probabilities of precomputed_ref where the reference is that cache."""
    if mode == "columns":
        demands.check_stored({"dataset": data, "eval_dataset": eval_data})
    if mode != "cache":
        return data, eval_data

    def keys() -> list[dict[str, str]]:
        # The key is of the reference: the model at its start, not as a checkpoint left it.
        source = models.freeze(models.load_model(config.ref_model or config.model, config))
        every = [data] if eval_data is None else [data, eval_data]
        return [reference_cache.cache_key(loaded.examples, source, config) for loaded in every]

    found = iter(processes.from_main(keys))  # one process holds a whole model for it

    def attached(option: str, loaded: Loaded) -> Loaded:
        with _of_option(f"precomputed_ref, for {option}"):
            stored = reference_cache.read(str(config.precomputed_ref), next(found))
        return loaded._replace(examples=reference_cache.attach(loaded.examples, CACHED, stored))

    return attached("dataset", data), eval_data and attached("eval_dataset", eval_data)


def open_reference(
    mode: str,
    config: TrainConfig,
    providers: Sequence[Provider],
    policy: hf.Model,
    frozen: Any,
    root: Root,
) -> Reference:
    """The reference of the run, and whatever is to be read off its forward."""
    return Reference(
        mode, config, policy=policy, root=root,
        model=frozen(config.ref_model or config.model) if mode == "model" else None,
        layers=any(provider.wants_layers for provider in providers),
        watch=[provider.watch for provider in providers],
    )  # fmt: skip


def describe(run: Run) -> str:
    """The resolved configuration, the model's head and the data counts, as JSON."""
    return json.dumps({"config": run.config.as_dict(), **run.facts}, indent=2)
