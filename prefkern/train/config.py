"""Every option of a training run, in one frozen dataclass.

The command line is derived from it, a YAML file fills it, a checkpoint stores it. Names follow TRL
and transformers where they have one. No torch import: reading a configuration is instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Options of `prefkern train`. A group answers one prompt: a pair, a list or one answer."""

    model: str
    """Causal language model: folder or hub name (transformers)."""
    dataset: str
    """JSON lines (plain or .gz), Parquet, or the name of a `datasets` data set."""
    output_dir: str = "prefkern-output"
    """Checkpoints, logs, curves and the final model go here."""

    # data
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
    pref_prob=confidence. Optional tensors of a loss are read only where they are named here."""
    score_prompt: bool = False
    """Score the prompt's tokens too, as DOVE does; the column prompt_rejected then matters."""
    likelihood_prompt: bool = False
    """Likelihood terms (orpo, cpo, sft, ...) score the prompt too, as ORPO's authors do."""
    append_eos: bool = True
    """End plain-text answers with EOS."""
    list_labels: Literal["scores", "order"] = "scores"
    """Labels of ranked lists: the scores as they are, or only their order (0 for the worst)."""
    strict: bool = False
    """Refuse the data set at the first bad row instead of counting and skipping bad rows."""
    limit: int | None = None
    """Use only the first rows of `dataset`."""
    eval_limit: int | None = None
    """Use only the first rows of `eval_dataset`."""

    # objective
    loss: tuple[str, ...] = ("dpo",)
    """One or more names from `prefkern losses`; several are summed with loss_weights."""
    loss_weights: tuple[float, ...] | None = None
    """One factor per loss (default: 1 each)."""
    loss_args: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the loss, e.g. {beta: 0.1}; on the command line --loss-arg beta=0.1."""
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
    fused_ref: tuple[str, ...] = ()
    """infifpo: files or folders of `prefkern precompute`, one per source model."""
    sync_ref_model: bool = False
    """Move the reference towards the policy while training (TR-DPO)."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in the new reference; 1 copies the policy (hard update)."""
    ref_model_sync_steps: int = 512
    """Optimizer steps between two syncs of the reference."""
    mask_learning_rate: float | None = None
    """Learning rate of sparsepo's mask module (default: learning_rate)."""
    mask_weight_decay: float = 0.01
    """Weight decay of sparsepo's mask module."""
    backend: str = "auto"
    """Backend of the fused ops: auto, reference, cpu, triton, cuda."""

    # adapter
    lora_r: int = 0
    """Rank of a LoRA adapter; 0 trains all weights."""
    lora_alpha: int = 16
    """Scale numerator of the adapter."""
    lora_dropout: float = 0.0
    """Dropout of the adapter (needs disable_dropout=False)."""
    lora_target_modules: tuple[str, ...] = ()
    """Layers to adapt; empty: all linear layers except the head."""
    slow_learning_rate: float | None = None
    """Train a second, slow LoRA adapter at this rate beside the one at learning_rate; needs loss
    dpo_second_reference. They change places when the slow one prefers the chosen answers more."""

    # rounds: runs one after the other, each from the model of the one before
    num_rounds: int = 1
    """Number of rounds (each num_train_epochs or max_steps long); with round_data=stages 0 is all
    stages."""
    round_data: Literal["same", "stages", "online"] = "same"
    """What a round trains on: the data set; the rows of its stage (column `stage`, or ranked lists,
    of which Curry-DPO's stages are made); answers sampled to its prompts when the round starts."""
    round_reference: Literal["previous", "start"] = "previous"
    """Reference from the second round on: the model the round starts from, or that of the first."""
    round_extrapolation: float = 0.0
    """After each round theta + a (theta - theta of the round before) (Accelerated PO; a = 0.3)."""

    # online rounds
    judge: str | None = None
    """Scores sampled answers: module:function or file.py:function, called with (row, answers) and
    returning one number per answer; or `implicit`, the policy's log-ratio to judge_ref_model."""
    judge_model: str | None = None
    """Reward model (sequence classification, one output) instead of judge."""
    judge_ref_model: str | None = None
    """The model that judge=implicit compares the policy with: the one it was trained from."""
    num_generations: int = 2
    """Answers sampled per prompt and round."""
    max_new_tokens: int = 128
    """Longest sampled answer in tokens."""
    generation_temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    generation_top_p: float = 1.0
    """Nucleus of the sampling; 1 samples from the whole distribution."""
    generation_batch_size: int = 16
    """Prompts that are answered at once."""
    generation_mixture: float = 0.0
    """Share b of the reference in the logits sampled from: (1-b) z + b z_ref (IPO-MD)."""
    keep_unfinished: bool = False
    """Also train on answers that max_new_tokens cut off; an end is appended to them."""
    prompts_per_round: int | None = None
    """Prompts sampled from per round, in the order of the data; default: all in every round."""
    online_pairs: Literal["all", "best_vs_rest", "adjacent", "best_vs_worst"] = "best_vs_worst"
    """Which answers to a prompt form pairs."""
    soft_judge: bool = False
    """ipo_md: the gap of two scores is a log-odds, and its probability the loss's target."""
    target_beta: float = 0.1
    """fdpg: the target is the reference times exp(score / target_beta)."""

    # batches
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

    # optimization
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

    # precision and memory
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
    device: Literal["auto", "cpu"] = "auto"
    """auto takes an accelerator when there is one."""

    # logs and checkpoints
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

    def __post_init__(self) -> None:
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be >= {low}, got {value}.")
        if not self.loss:
            raise ValueError("loss must name at least one loss, got none; see `prefkern losses`.")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            raise ValueError(
                f"loss_weights must have one number per loss, got {len(self.loss_weights)} for "
                f"{len(self.loss)} losses {list(self.loss)}."
            )
        if self.token_budget is not None and self.packing == "off":
            raise ValueError("token_budget packs sequences; it cannot go with packing=off.")
        if self.lora_dropout and self.disable_dropout:
            raise ValueError(
                f"lora_dropout={self.lora_dropout} needs disable_dropout=False (default: True)."
            )
        if bad := [k for k, v in self.columns.items() if not (isinstance(v, str) and v)]:
            raise ValueError(f"columns: {', '.join(map(str, bad))} must name a column.")
        if self.precomputed_ref and self.reference != "auto":
            raise ValueError(
                f"precomputed_ref replaces the reference model; it cannot go with reference="
                f"{self.reference}; leave reference=auto."
            )
        from .loop_options import check

        check(self)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


_LOWEST = {
    "max_length": 2,
    "limit": 1,
    "eval_limit": 1,
    "lora_r": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "token_budget": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "warmup_steps": 0,
    "warmup_ratio": 0.0,
    "num_train_epochs": 0.0,
    "logging_steps": 1,
    "eval_steps": 0,
    "save_steps": 0,
    "save_total_limit": 1,
    "memory_budget": 0,
    "num_rounds": 0,
    "ref_model_sync_steps": 1,
    "round_extrapolation": 0.0,
    "slow_learning_rate": 0.0,
    "num_generations": 1,
    "max_new_tokens": 1,
    "generation_temperature": 0.0,
    "generation_batch_size": 1,
    "prompts_per_round": 1,
}

# Options that do not change the sequence of weights: a resumed run may set them differently.
_FREE_ON_RESUME = frozenset(
    {
        "output_dir", "eval_dataset", "eval_split", "eval_limit", "per_device_eval_batch_size",
        "logging_steps", "eval_steps", "save_steps", "save_total_limit", "resume_from_checkpoint",
        "overwrite_output_dir", "report_to", "run_name", "plots", "disable_tqdm", "memory_budget",
    }
)  # fmt: skip


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """'; nearest: a, b' or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; nearest: {', '.join(close)}" if close else ""


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` from YAML in the type of the field; raises ValueError where it does not fit."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, UnionType):
        if value is None:
            return None
        return _coerce(name, value, next(a for a in typing.get_args(kind) if a is not type(None)))
    if origin is Literal:
        # YAML reads on/off as booleans
        if isinstance(value, bool) and "on" in typing.get_args(kind):
            value = "on" if value else "off"
        if value in typing.get_args(kind):
            return value
        raise ValueError(f"{name} must be one of {list(typing.get_args(kind))}, got {value!r}.")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(name, item, typing.get_args(kind)[0]) for item in items)
    if origin is dict:
        if isinstance(value, dict):
            return dict(value)
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is float and isinstance(value, int | float | str):
        return float(value)  # YAML 1.1 reads 1e-6 as a string
    elif kind is int and isinstance(value, int):
        return value
    elif kind is str and isinstance(value, str | int | float):
        return str(value)
    expected = getattr(kind, "__name__", str(kind))
    raise ValueError(f"{name} must be {expected}, got {value!r}.")


def from_mapping(values: dict[str, Any], *, origin: str = "configuration") -> TrainConfig:
    """A TrainConfig from a mapping (YAML, JSON); unknown keys are errors with the nearest names."""
    kinds = typing.get_type_hints(TrainConfig)
    known = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            raise ValueError(f"{origin}: unknown key {key!r}{nearest(name, kinds)}.")
        known[name] = _coerce(f"{origin}: {key}", value, kinds[name])
    missing = [
        f.name
        for f in dataclasses.fields(TrainConfig)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in known
    ]
    if missing:
        raise ValueError(f"{origin}: {' and '.join(missing)} must be given.")
    return TrainConfig(**known)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ValueError naming the file when it is none."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable YAML file: {reason}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(values).__name__}.")
    return values


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


def fingerprint(value: Any) -> str:
    """Short stable hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
