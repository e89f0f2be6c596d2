"""Every option of a training run, in one frozen dataclass made of groups.

The command line is derived from it, a YAML file fills it, a checkpoint stores it. Names follow TRL
and transformers where they have one. A group's `check` sees the group alone; what goes together
with which loss or recipe is checked where a run is prepared, before any model is loaded. No torch
import: reading a configuration is instant.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from .recipes.options import (
    BaselineOptions,
    FusedOptions,
    HeadOptions,
    ImageOptions,
    MaskOptions,
    OnlineOptions,
    RejectedReferenceOptions,
    SpeedOptions,
    StepOptions,
    SyncOptions,
    ValueOptions,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The model, the data, and where the results go."""

    LOWEST: ClassVar[dict[str, float]] = {
        "max_length": 2,
        "limit": 1,
        "eval_limit": 1,
    }

    model: str
    """Causal language model: folder or hub name (transformers)."""
    dataset: str
    """JSON lines (plain or .gz), Parquet, or the name of a `datasets` data set."""
    output_dir: str = "prefkern-output"
    """Checkpoints, logs, curves and the final model go here."""
    eval_dataset: str | None = None
    """Held-out data, evaluated every eval_steps and at the end."""
    dataset_split: str = "train"
    """Split of `dataset` (only for `datasets` names)."""
    eval_split: str = "test"
    """Split of `eval_dataset` (only for `datasets` names)."""
    layout: Literal["auto", "pairs", "lists", "unpaired"] = "auto"
    """What a row is; auto reads it off the columns."""
    max_length: int = 1024
    """Prompt plus completion in tokens; longer rows keep their start."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns under other names: what a loss reads -> column; on the command line --column
    pref_prob=confidence, or --column prompt=question. Optional tensors of a loss are read only
    where they are named here."""
    score_prompt: bool = False
    """Score the prompt's tokens too, as DOVE does; the column prompt_rejected then matters."""
    likelihood_prompt: bool = False
    """Likelihood terms (orpo, cpo, sft, ...) score the prompt too, as ORPO's authors do."""
    append_eos: bool = True
    """End plain-text answers with EOS."""
    list_labels: Literal["auto", "scores", "order"] = "auto"
    """Labels of ranked lists: the scores as they are, or only their order (0 for the worst); auto
    takes the scores, and says so where they are no grades that a loss's gains 2^label can use and
    only their order is taken."""
    strict: bool = False
    """Refuse the data set at the first bad row instead of counting and skipping bad rows."""
    limit: int | None = None
    """Use only the first rows of `dataset`."""
    eval_limit: int | None = None
    """Use only the first rows of `eval_dataset`."""

    def check(self) -> None:
        if bad := [k for k, v in self.columns.items() if not (isinstance(v, str) and v)]:
            raise ValueError(f"columns: {', '.join(map(str, bad))} must name a column.")
        if not self.output_dir:
            raise ValueError("output_dir must name a folder, got an empty text.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The losses of the run."""

    loss: tuple[str, ...] = ("dpo",)
    """One or more names from `prefkern losses`; several are summed with loss_weights."""
    loss_weights: tuple[float, ...] | None = None
    """One factor per loss (default: 1 each)."""
    loss_args: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the loss, e.g. {beta: 0.1}; on the command line --loss-arg beta=0.1."""

    def check(self) -> None:
        if not self.loss:
            raise ValueError("loss must name at least one loss, got none; see `prefkern losses`.")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            raise ValueError(
                f"loss_weights must have one number per loss, got {len(self.loss_weights)} for "
                f"{len(self.loss)} losses {list(self.loss)}."
            )


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """The models that the policy is compared with."""

    STORED: ClassVar[tuple[str, ...]] = ("precomputed_ref", "precomputed_aux")  # by `precompute`

    reference: Literal["auto", "model", "adapter", "columns", "none"] = "auto"
    """Where the reference comes from; auto: none, the cache, the adapter switched off, or a second
    model, whichever the loss, precomputed_ref and lora_r call for."""
    ref_model: str | None = None
    """Reference model; default: a frozen copy of `model`."""
    precomputed_ref: str | None = None
    """File or folder written by `prefkern precompute`."""
    aux_model: str | None = None
    """Second frozen model for losses that read one (tgdpo's token rewards): a DPO-trained one."""
    precomputed_aux: str | None = None
    """Instead of aux_model: what `prefkern precompute --model AUX` wrote for the same data."""

    def check(self) -> None:
        if self.precomputed_ref and self.reference != "auto":
            raise ValueError(
                f"precomputed_ref replaces the reference model; it cannot go with reference="
                f"{self.reference}; leave reference=auto."
            )
        if self.precomputed_aux is not None and self.aux_model is not None:
            raise ValueError("precomputed_aux is read instead of aux_model; give one of the two.")


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """A LoRA adapter on the policy."""

    LOWEST: ClassVar[dict[str, float]] = {
        "lora_r": 0,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
    }

    lora_r: int = 0
    """Rank of a LoRA adapter; 0 trains all weights."""
    lora_alpha: int = 16
    """Scale numerator of the adapter."""
    lora_dropout: float = 0.0
    """Dropout of the adapter (needs disable_dropout=False)."""
    lora_target_modules: tuple[str, ...] = ()
    """Layers to adapt; empty: all linear layers except the head."""

    def check(self) -> None:
        if self.lora_dropout >= 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}.")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Micro-batches."""

    LOWEST: ClassVar[dict[str, float]] = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "token_budget": 2,
        "gradient_accumulation_steps": 1,
    }

    per_device_train_batch_size: int = 8
    """Groups per micro-batch and process."""
    per_device_eval_batch_size: int = 8
    """Groups per evaluation batch and process."""
    token_budget: int | None = None
    """Fill packed micro-batches up to this many tokens instead of a fixed number of groups."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Concatenate sequences instead of padding them; auto checks that the model supports it."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step and process; denominators are global over the step."""

    def check(self) -> None:
        if self.token_budget is not None and self.packing == "off":
            raise ValueError("token_budget packs sequences; it cannot go with packing=off.")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW, its schedule, and the length of the run."""

    LOWEST: ClassVar[dict[str, float]] = {
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "adam_epsilon": 0.0,
        "seed": 0,
        "max_grad_norm": 0.0,
        "warmup_steps": 0,
        "warmup_ratio": 0.0,
        "num_train_epochs": 0.0,
        "max_steps": -1,
    }

    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms have none."""
    adam_beta1: float = 0.9
    """AdamW's first decay rate."""
    adam_beta2: float = 0.999
    """AdamW's second decay rate."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm; 0 turns clipping off."""
    lr_scheduler_type: str = "linear"
    """Any schedule name of transformers: linear, cosine, constant_with_warmup, ..."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of all steps (used when warmup_steps is 0)."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps; > 0 overrides num_train_epochs."""
    seed: int = 42
    """Order of the data, dropout, adapter and mask initialisation."""

    def check(self) -> None:
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}.")
        if self.warmup_ratio > 1.0:
            raise ValueError(f"warmup_ratio must be in [0, 1], got {self.warmup_ratio}.")
        if self.max_steps <= 0 and self.num_train_epochs == 0.0:
            raise ValueError("num_train_epochs=0 trains nothing; raise it, or set max_steps.")


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Precision, memory and device."""

    LOWEST: ClassVar[dict[str, float]] = {
        "memory_budget": 0,
        "tail_mass": 0.0,
    }

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in memory (and of the checkpoint)."""
    bf16: bool = False
    """Compute in bfloat16 (autocast) over weights of type `dtype`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    attn_implementation: str | None = None
    """transformers' attention: eager, sdpa, flash_attention_2, ... (default: the model's own)."""
    disable_dropout: bool = True
    """Set every dropout of policy and mask module to 0."""
    memory_budget: int | None = None
    """Bytes of logits kept between forward and backward; changes time, not one bit of a result."""
    tail_mass: float = 0.0
    """Probability mass per token, 0 to 1, that the backward may leave out; 0 is exact."""
    backend: str = "auto"
    """Backend of the fused ops: auto, eager, cpu, triton, cuda."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes an accelerator when there is one."""

    def check(self) -> None:
        if self.tail_mass > 1.0:
            raise ValueError(f"tail_mass must be in [0, 1], got {self.tail_mass}.")


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """Logs and checkpoints."""

    LOWEST: ClassVar[dict[str, float]] = {
        "logging_steps": 1,
        "eval_steps": 0,
        "save_steps": 0,
        "save_total_limit": 1,
    }

    logging_steps: int = 10
    """Steps per logged row."""
    eval_steps: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    save_steps: int = 500
    """Steps between checkpoints; 0: none but the final model."""
    save_total_limit: int | None = None
    """Keep only the newest checkpoints."""
    resume_from_checkpoint: str | None = None
    """auto (the newest in output_dir, if any) or a checkpoint folder; continues bit for bit."""
    overwrite_output_dir: bool = False
    """Start afresh in a folder that holds checkpoints."""
    report_to: tuple[str, ...] = ()
    """Trackers of accelerate: tensorboard, wandb, trackio, mlflow, ..."""
    run_name: str = "prefkern"
    """Project name given to the trackers."""
    plots: bool = True
    """Write PNG curves at the end."""
    disable_tqdm: bool = False
    """No progress bar."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    # fields come in the reverse order of the bases
    LogOptions,
    ComputeOptions,
    OptimizerOptions,
    BatchOptions,
    OnlineOptions,
    SpeedOptions,
    AdapterOptions,
    StepOptions,
    ValueOptions,
    MaskOptions,
    SyncOptions,
    FusedOptions,
    BaselineOptions,
    HeadOptions,
    ImageOptions,
    RejectedReferenceOptions,
    ReferenceOptions,
    ObjectiveOptions,
    DataOptions,
):
    """Options of `prefkern train`. A group answers one prompt: a pair, a list or one answer."""

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            for value in _numbers(getattr(self, option.name)):
                if not math.isfinite(value):
                    raise ValueError(f"{option.name} must be finite, got {value}.")
        groups = [vars(group) for group in reversed(type(self).__mro__)]
        for name, low in (item for group in groups for item in group.get("LOWEST", {}).items()):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be >= {low}, got {value}.")
        for group in groups:
            if "check" in group:
                group["check"](self)
        if self.head == "reward" and self.has_rounds:
            raise ValueError("head=reward trains in one run; drop num_rounds and round_data.")
        if self.lora_dropout and self.disable_dropout:
            raise ValueError(
                f"lora_dropout={self.lora_dropout} needs disable_dropout=False (default: True)."
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _numbers(value: Any) -> list[float]:
    """The floats in an option's value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, float) else []


# Options that do not change the sequence of weights: a resumed run may set them differently.
_FREE_ON_RESUME = frozenset(
    {
        "output_dir", "eval_dataset", "eval_split", "eval_limit", "per_device_eval_batch_size",
        "logging_steps", "eval_steps", "save_steps", "save_total_limit", "resume_from_checkpoint",
        "overwrite_output_dir", "report_to", "run_name", "plots", "disable_tqdm", "memory_budget",
    }
)  # fmt: skip


def check_same_run(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raises ValueError naming the options that would make a resumed run a different one."""
    now = config.as_dict()
    changed = [
        f"{name}: was {saved.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if name not in _FREE_ON_RESUME and saved.get(name) != value
    ]
    if changed:
        raise ValueError(
            "the checkpoint was written by a run with other options and cannot be continued: "
            + "; ".join(changed)
            + ". Restore these options, or start afresh with --overwrite-output-dir."
        )


def short_hash(value: Any) -> str:
    """Short stable hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
