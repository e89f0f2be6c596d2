"""What the recipes add to a configuration: one group of options each, checked among itself.

`TrainConfig` inherits the groups. No torch import, as in config.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class FusedOptions:
    """Of recipes.fused_reference."""

    STORED: ClassVar[tuple[str, ...]] = ("fused_ref",)

    fused_ref: tuple[str, ...] = ()
    """infifpo: files or folders of `prefkern precompute`, one per source model."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Of recipes.images."""

    image_column: str | None = None
    """Column of pictures (a path relative to the data file, bytes or a picture of `datasets`; one
    or a list per row): `model` is then a vision-language model. COLUMN_rejected and COLUMN_cond
    hold those of the rejected answer and of mm_dpo's other condition."""

    def check(self) -> None:
        if self.image_column == "":
            raise ValueError("image_column must name a column.")


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Of recipes.reward."""

    LOWEST: ClassVar[dict[str, float]] = {
        "num_outputs": 1, "prototypes": 1, "prototype_learning_rate": 0.0,
    }  # fmt: skip

    head: Literal["lm", "reward"] = "lm"
    """What is trained: a causal model's log-probabilities (lm), or the scores of a sequence-
    classification model (reward), made of a causal model where `model` is one."""
    num_outputs: int | None = None
    """head=reward: outputs per answer (default: those that `model` has, else 1)."""
    output_weights: tuple[float, ...] = ()
    """head=reward: an answer's score is this weighted sum of its outputs; needed for several."""
    prototypes: int = 2
    """head=reward, pal: points of which every user's ideal point is a mixture."""
    prototype_learning_rate: float | None = None
    """head=reward, pal: learning rate of prototypes and users (default: learning_rate)."""

    def check(self) -> None:
        if self.head == "lm":
            for name in ("num_outputs", "output_weights", "prototypes", "prototype_learning_rate"):
                if getattr(self, name) != getattr(HeadOptions, name):
                    raise ValueError(f"{name} is of reward models; set head=reward, or drop it.")


@dataclass(frozen=True, kw_only=True)
class BaselineOptions:
    """Of recipes.baseline."""

    STORED: ClassVar[tuple[str, ...]] = ("precomputed_baseline",)

    precomputed_baseline: tuple[str, ...] = ()
    """poft: files or folders of `prefkern precompute`, one per baseline model; the mean of their
    mean log-probabilities is what the policy is to surpass."""


@dataclass(frozen=True, kw_only=True)
class SyncOptions:
    """Of recipes.sync."""

    LOWEST: ClassVar[dict[str, float]] = {"ref_model_sync_steps": 1}

    sync_ref_model: bool = False
    """Move the reference towards the policy while training (TR-DPO)."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in the new reference; 1 copies the policy (hard update)."""
    ref_model_sync_steps: int = 512
    """Optimizer steps between two syncs of the reference."""

    def check(self) -> None:
        if not 0.0 < self.ref_model_mixup_alpha <= 1.0:
            raise ValueError(
                f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}."
            )


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """Of recipes.masks."""

    mask_learning_rate: float | None = None
    """Learning rate of sparsepo's mask module (default: learning_rate)."""
    mask_weight_decay: float = 0.01
    """Weight decay of sparsepo's mask module."""


@dataclass(frozen=True, kw_only=True)
class RejectedReferenceOptions:
    """Of recipes.rejected_reference."""

    rejected_ref_model: str | None = None
    """d2o, d2o_list: reference of the rejected answers (the more helpful one), beside ref_model,
    that of the self-samples."""


@dataclass(frozen=True, kw_only=True)
class ValueOptions:
    """Of recipes.value_head."""

    LOWEST: ClassVar[dict[str, float]] = {"value_learning_rate": 0.0}

    value_learning_rate: float | None = None
    """Learning rate of the value head of oreo and rto (default: learning_rate); 0 leaves it at
    the value 0."""
    value_gradient: bool = False
    """The value loss also moves the policy below the head; default: it trains the head alone."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Of recipes.steps."""

    LOWEST: ClassVar[dict[str, float]] = {"step_size": 1, "step_count": 1}

    step_pattern: str | None = None
    """Split answers into steps at this regular expression, for losses that read step_index. A match
    begins a step; one of white space alone (\\n\\n) ends the step before it."""
    step_size: int | None = None
    """Instead of step_pattern: steps of so many tokens."""
    step_count: int | None = None
    """Instead of step_pattern: so many steps of every answer, equally long to one token."""

    def check(self) -> None:
        given = (self.step_pattern, self.step_size, self.step_count)
        if sum(value is not None for value in given) > 1:
            raise ValueError(
                "step_pattern, step_size and step_count are three ways to split answers; give one."
            )
        if self.step_pattern is None:
            return
        try:
            matches_nothing = re.compile(self.step_pattern).match("") is not None
        except re.error as error:
            raise ValueError(
                f"step_pattern must be a regular expression, got {self.step_pattern!r}: {error}."
            ) from None
        if matches_nothing:
            raise ValueError(
                f"step_pattern {self.step_pattern!r} matches the empty text and would begin a step "
                "everywhere; write what stands between or before steps, such as 'Step [0-9]+:'."
            )


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """Of recipes.two_speeds."""

    LOWEST: ClassVar[dict[str, float]] = {"slow_learning_rate": 0.0}

    slow_learning_rate: float | None = None
    """Train a second, slow LoRA adapter at this rate beside the one at learning_rate; needs loss
    dpo_second_reference. They change places when the slow one prefers the chosen answers more."""


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """Of recipes.rounds: runs one after the other, each from the model of the one before."""

    LOWEST: ClassVar[dict[str, float]] = {"num_rounds": 0, "round_extrapolation": 0.0}

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

    @property
    def has_rounds(self) -> bool:
        """Whether the run is a sequence of rounds and not one run of the loop."""
        return self.num_rounds != 1 or self.round_data != "same" or self.round_extrapolation > 0

    def check(self) -> None:
        if self.num_rounds == 0 and self.round_data != "stages":
            raise ValueError("num_rounds=0 means one round per stage; it needs round_data=stages.")


@dataclass(frozen=True, kw_only=True)
class OnlineOptions(RoundOptions):
    """Of recipes.online: rounds on answers that are sampled and judged when the round starts."""

    LOWEST: ClassVar[dict[str, float]] = {
        "num_generations": 1,
        "max_new_tokens": 1,
        "generation_temperature": 0.0,
        "generation_batch_size": 1,
        "prompts_per_round": 1,
        "sample_every": 0,
    }
    # Options that say that answers are to be sampled; the others only say how.
    ONLINE_ALONE: ClassVar[tuple[str, ...]] = (
        "judge", "judge_model", "judge_ref_model", "generation_mixture", "soft_judge",
        "keep_unfinished", "prompts_per_round", "sample_every", "judge_weights", "judge_normalize",
    )  # fmt: skip

    judge: str | None = None
    """Scores sampled answers: module:function or file.py:function, called with (row, answers) and
    returning one number per answer, or a list of numbers, one per objective, with judge_weights; or
    `implicit`, the policy's log-ratio to judge_ref_model."""
    judge_model: str | None = None
    """Reward model (sequence classification, one output per objective) instead of judge."""
    judge_weights: tuple[float, ...] | None = None
    """Factor of each objective in an answer's score, for a judge of several."""
    judge_normalize: Literal["sum", "each"] = "sum"
    """Losses over advantages: normalise the weighted sum within the answers to a prompt, or each
    objective before they are summed."""
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
    sample_every: int = 0
    """Sample anew after so many steps of a round too, with model and optimizer kept (needs
    max_steps); 0: once, when a round starts."""
    online_pairs: Literal["all", "best_vs_rest", "adjacent", "best_vs_worst"] = "best_vs_worst"
    """Which answers to a prompt form pairs."""
    soft_judge: bool = False
    """ipo_md: the gap of two scores is a log-odds, and its probability the loss's target."""
    target_beta: float = 0.1
    """fdpg: the target is the reference times exp(score / target_beta)."""

    def check(self) -> None:
        if self.round_data != "online":
            for name in self.ONLINE_ALONE:
                if getattr(self, name) != getattr(OnlineOptions, name):
                    raise ValueError(
                        f"{name} is for answers sampled in rounds; set round_data=online."
                    )
            return
        if self.judge is not None and self.judge_model is not None:
            raise ValueError(
                "round_data=online scores sampled answers: give exactly one of judge and "
                "judge_model."
            )
        if self.judge_normalize != "sum" and self.judge_weights is None:
            raise ValueError("judge_normalize=each is for several objectives: set judge_weights.")
        if (self.judge == "implicit") != (self.judge_ref_model is not None):
            raise ValueError(
                "judge=implicit and judge_ref_model go together: the implicit reward is the "
                "policy's log-ratio to the model it was trained from (to itself it is 0 "
                "everywhere)."
            )
        if not 0.0 <= self.generation_mixture <= 1.0:
            raise ValueError(
                f"generation_mixture must be in [0, 1], got {self.generation_mixture}."
            )
        if not 0.0 < self.generation_top_p <= 1.0:
            raise ValueError(f"generation_top_p must be in (0, 1], got {self.generation_top_p}.")
        if self.target_beta <= 0.0:
            raise ValueError(f"target_beta must be > 0, got {self.target_beta}.")
        if self.generation_temperature == 0.0 and self.num_generations > 1:
            raise ValueError(
                "generation_temperature=0 gives the same answer every time; use a temperature "
                "above 0 for num_generations > 1."
            )
