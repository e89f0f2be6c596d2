"""Everything a run needs before its first step: processes, models, data, and the checks on them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..integrations import hf, packed_attention
from ..losses.record import Loss
from . import checkpoint as ckpt
from . import checks, fuse, inputs, models, reference_cache, speeds, sync
from . import masks as mask_module
from .config import TrainConfig
from .data import Example, SkipReport, collate, load_examples
from .loop_options import has_rounds
from .reference import Needs, Reference, choose_mode
from .states import LossStates
from .step import PreferenceStep


@dataclass
class Run:
    """A prepared run. Examples are held by every process; batches are dealt out by rank."""

    config: TrainConfig
    accelerator: Any
    tokenizer: Any
    step: PreferenceStep
    reference: Reference
    needs: Needs
    records: list[Loss]
    layout: str
    packed: bool
    examples: list[Example]
    report: SkipReport
    eval_examples: list[Example]
    eval_report: SkipReport | None
    eval_reference: Reference
    resume: Path | None
    facts: dict[str, Any]  # what --dry-run shows
    parts: list[ckpt.Part] = field(default_factory=list)  # what moves after every step

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def pad_id(self) -> int:
        """A tokenizer without pad pads with 0: masked positions are never read."""
        return self.tokenizer.pad_token_id or 0

    def count_items(self, examples: list[Example]) -> dict[str, int]:
        """Denominators of `examples`, all of one step."""
        row, whole = inputs.likelihood_row(self.records), self.config.likelihood_prompt
        return inputs.count_items(examples, row, whole=whole)

    @property
    def collate_options(self) -> dict[str, Any]:
        """How batches of this run are collated."""
        row = inputs.whole_row(self.records, self.config)
        return {"packed": self.packed, "pad_id": self.pad_id, "whole_row": row}

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, file=sys.stderr)


def make_accelerator(config: TrainConfig) -> Any:
    from accelerate import Accelerator, tracking
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    # accelerate leaves out trackers that are not installed without a word
    known_trackers = ["all", *(str(name) for name in tracking.get_available_trackers())]
    if lacking := [name for name in config.report_to if name not in known_trackers]:
        raise ValueError(
            f"report_to: {', '.join(lacking)} is not installed here or no tracker of accelerate's; "
            f"available: {', '.join(known_trackers[1:]) or 'none'}."
        )
    handlers = []
    if config.round_data == "online":
        # one process judges while the others wait, which may take longer than NCCL's 10 minutes
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(hours=12)))
    accelerator = Accelerator(
        kwargs_handlers=handlers,
        cpu=config.device == "cpu",
        mixed_precision="no",  # autocast is the step's own, so that evaluation has the same
        log_with=list(config.report_to) or None,
        project_dir=config.output_dir,
    )
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known:
        raise ValueError(
            f"this trainer runs on one device or with DistributedDataParallel, not with "
            f"{accelerator.distributed_type}; start it with torchrun."
        )
    return accelerator


def load_data(
    source: str,
    split: str,
    config: TrainConfig,
    limit: int | None,
    tokenizer: Any,
    model: nn.Module,
    *,
    records: list[Loss] | None = None,  # None: read no column that only a loss reads
) -> tuple[list[Example], str, SkipReport]:
    return load_examples(
        source,
        split=split,
        tokenizer=tokenizer,
        layout=config.layout,
        max_length=config.max_length,
        model_context=models.context_length(model),
        vocab_size=hf.text_config(model).vocab_size,
        strict=config.strict,
        seed=config.seed,
        limit=limit,
        append_eos=config.append_eos,
        list_labels=config.list_labels,
        score_prompt=config.score_prompt,
        extras=inputs.extras_of(records, config) if records else (),
        roles=inputs.roles_of(records, config) if records else None,
        labelled=inputs.needs_labels(records or []),
        # bialign reads the first answer of a list as the one with the whole context
        shuffle_lists=not any(record.name == "bialign" for record in records or ()),
    )


def prepare(config: TrainConfig, *, training: bool = True) -> Run:
    """Loads and checks everything; the same for training, evaluation and a dry run.

    Raises:
        ValueError: every mistake of the user's, with what to do.
    """
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    if config.disable_tqdm:
        transformers_logging.disable_progress_bar()
    if training and has_rounds(config):
        raise ValueError(
            "num_rounds, round_data: a run of rounds is started by prefkern.train.train."
        )
    records = checks.check_losses(config)
    inputs.extras_of(records, config)  # a loss that cannot be fed is told before models load
    inputs.whole_row(records, config)
    inputs.likelihood_row(records)
    output_dir = Path(config.output_dir)
    resume = ckpt.find_resume(config.resume_from_checkpoint, output_dir) if training else None
    fresh = training and config.resume_from_checkpoint is None and not config.overwrite_output_dir
    if fresh and ckpt.list_checkpoints(output_dir):
        raise ValueError(
            f"{output_dir} holds checkpoints of an earlier run; pass --resume-from-checkpoint auto "
            "to continue it, --overwrite-output-dir to start afresh, or another --output-dir."
        )
    accelerator = make_accelerator(config)
    set_seed(config.seed)
    tokenizer = models.load_tokenizer(config.model)
    policy = models.load_policy(config, resume)
    if config.slow_learning_rate is not None:
        speeds.add_slow_adapter(policy, resume or Path(config.model), accelerator.num_processes)
    hf.refuse_unsupported(policy)
    has_adapter = hasattr(policy, "peft_config")
    needs = Needs.of(config.loss, config.loss_args, config.columns)
    mode = choose_mode(config, needs, has_adapter)
    if (config.aux_model or config.precomputed_aux) and not (needs.aux or needs.aux_head):
        raise ValueError(
            f"loss {', '.join(config.loss)} reads no second frozen model, or a column gives what "
            "it reads of one; drop aux_model and precomputed_aux."
        )

    examples, layout, report = load_data(
        config.dataset, config.dataset_split, config, config.limit, tokenizer, policy,
        records=records,
    )  # fmt: skip
    checks.check_family(records, layout, score_prompt=config.score_prompt)
    eval_examples: list[Example] = []
    eval_report: SkipReport | None = None
    if config.eval_dataset is not None:
        eval_examples, eval_layout, eval_report = load_data(
            config.eval_dataset, config.eval_split, config, config.eval_limit, tokenizer, policy,
            records=records,
        )  # fmt: skip
        if eval_layout != layout:
            raise ValueError(
                f"dataset holds {layout}, eval_dataset holds {eval_layout}: they must match."
            )

    if config.fused_ref:
        examples = fuse.with_sources(examples, config.fused_ref)
        if eval_examples:
            eval_examples = fuse.with_sources(eval_examples, config.fused_ref)

    if mode == "model" and not training and config.ref_model is None:
        raise ValueError(
            "evaluation compares the model with a reference: pass --ref-model, the model it was "
            "trained from (a model compared with itself has margins of 0)."
        )

    def say(text: str) -> None:
        if accelerator.is_main_process:
            print(text, file=sys.stderr)

    policy.to(accelerator.device)
    head_difference = checks.check_first_batch(policy, examples, config)
    packed = checks.choose_packing(say, policy, examples, config)
    if needs.kl_baseline and config.per_device_train_batch_size == 1:
        say("kto: with one row per micro-batch the mismatched answer is the row's own; use >= 2.")
    model = aux = None
    if mode == "model":
        model = _frozen(config.ref_model or config.model, config, examples, packed, policy)
    aux_caches = fuse.aux_caches(config, examples, eval_examples)
    if needs.aux_head or (needs.aux and not config.precomputed_aux):
        if config.aux_model is None:
            raise ValueError(
                f"loss {', '.join(config.loss)} reads a second frozen model: pass --aux-model"
                + (" (or columns, --column aux_logp=NAME)." if needs.aux else ".")
            )
        aux = _frozen(config.aux_model, config, examples, packed, policy)
    if needs.aux_head and aux is not None:
        ours, theirs = (hf.read_head(m) for m in (model or policy, aux))
        same = (ours.scale, ours.softcap) == (theirs.scale, theirs.softcap)
        if theirs.bias is not None or ours.bias is not None or not same:
            raise ValueError(
                f"loss {', '.join(config.loss)} forms the aux model's logits with the reference's "
                "scale and cap and without a bias; --aux-model and --ref-model must agree in them."
            )
    cache = eval_cache = None
    if mode == "cache":
        # The key is of the reference: the model at its start, not as a checkpoint left it.
        source = models.freeze(models.load_model(config.ref_model or config.model, config))
        cache, eval_cache = (
            reference_cache.ReferenceCache.load(
                str(config.precomputed_ref), data, reference_cache.cache_key(data, source, config)
            )
            if data
            else None
            for data in (examples, eval_examples)
        )
    masks = None
    if needs.masks:
        masks = mask_module.build(config, model or policy).to(accelerator.device)
    states = LossStates(records, inputs.given_by_user(config), config.loss_args, config.seed)
    if not training:
        states.load_from(Path(config.model))
    parts: list[ckpt.Part] = []
    if config.slow_learning_rate is None:
        step = PreferenceStep(policy, config, layout, masks, states)
    else:
        step = speeds.TwoSpeedStep(policy, config, layout, masks, states)
        parts.append(step)
    if config.sync_ref_model:
        alpha, every = config.ref_model_mixup_alpha, config.ref_model_sync_steps
        parts.append(sync.ReferenceSync(policy, model, alpha=alpha, every=every))

    def reference(number: int) -> Reference:
        return Reference(
            mode, needs, config, policy=policy, model=model, aux=aux,
            cache=(cache, eval_cache)[number], aux_cache=aux_caches[number],
        )  # fmt: skip

    run = Run(
        config=config, accelerator=accelerator, tokenizer=tokenizer, step=step, needs=needs,
        records=records, reference=reference(0), eval_reference=reference(1), layout=layout,
        packed=packed, examples=examples, report=report, eval_examples=eval_examples,
        eval_report=eval_report, resume=resume, facts={}, parts=parts,
    )  # fmt: skip
    if masks is not None and training and resume is None:
        first = list(range(min(len(examples), config.per_device_train_batch_size)))
        batch = collate([examples[i] for i in first], packed=packed, pad_id=run.pad_id)
        rows = run.reference.rows(batch.to(accelerator.device), first)
        assert rows.layers is not None
        if draws := mask_module.redraw_dead(masks, rows.layers):
            say(f"sparsepo: masks that were 0 on nearly every token, drawn again {draws} time(s).")
    run.facts = _facts(run, mode, head_difference)
    return run


def _frozen(
    name: str, config: TrainConfig, examples: list[Example], packed: bool, policy: nn.Module
) -> nn.Module:
    """A second model without gradients on the policy's device, checked like the policy."""
    model = models.freeze(models.load_model(name, config)).to(next(policy.parameters()).device)
    hf.refuse_unsupported(model)
    checks.check_first_batch(model, examples, config)
    if hf.read_head(policy).softcap is not None and hf.read_head(model).softcap is None:
        # the ops read "no cap given" for the reference as "the policy's cap"
        raise ValueError(
            f"{name} does not cap its logits and the policy does: such a pair cannot be compared."
        )
    own, other = (hf.read_head(m).weight.shape[0] for m in (policy, model))
    if own != other:
        raise ValueError(
            f"{name} has a head of {other} entries, the policy's has {own}: their "
            "log-probabilities cannot be compared; both must share one vocabulary."
        )
    if packed:
        inner, head = hf.causal_lm(model), hf.text_config(policy)
        if head._attn_implementation == packed_attention.NAME:
            packed_attention.use(inner, config.max_length)
        limit = checks.PACKING_LIMIT[next(model.parameters()).dtype]
        if (found := checks.packing_difference(model, examples, config)) > limit:
            raise ValueError(
                f"{name} cannot read packed batches (difference {found:.3g} nats); use packing=off."
            )
    return model


def _facts(run: Run, mode: str, head_difference: float) -> dict[str, Any]:
    head = hf.read_head(run.step.policy)
    parameters = list(run.step.parameters())
    return {
        "model": type(hf.causal_lm(run.step.policy)).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "head": {
            "vocabulary": head.weight.shape[0],
            "hidden": head.weight.shape[1],
            "dtype": str(head.weight.dtype).removeprefix("torch."),
            "bias": head.bias is not None,
            "scale": head.scale,
            "softcap": head.softcap,
            "tied": head.weight is hf.causal_lm(run.step.policy).get_input_embeddings().weight,
            "largest_difference_to_own_logits": head_difference,
        },
        "reference": mode,
        "layout": run.layout,
        "columns": {e.argument: e.column for e in inputs.extras_of(run.records, run.config)},
        "batches": "packed" if run.packed else "padded",
        "data": _counts(run.examples, run.report),
        "eval_data": _counts(run.eval_examples, run.eval_report) if run.eval_examples else None,
    }


def _counts(examples: list[Example], report: SkipReport | None) -> dict[str, Any]:
    return {
        "groups": len(examples),
        "sequences": sum(len(e.sequences) for e in examples),
        "tokens": sum(len(s.input_ids) for e in examples for s in e.sequences),
        "scored_tokens": sum(s.length for e in examples for s in e.sequences),
        **({} if report is None else {"report": report.as_dict()}),
    }


def describe(run: Run) -> str:
    """The resolved configuration, the model's head and the data counts, as JSON."""
    return json.dumps({"config": run.config.as_dict(), **run.facts}, indent=2)
