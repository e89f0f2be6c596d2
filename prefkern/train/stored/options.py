"""The options of `prefkern score` and `prefkern sample`; no torch import, as in config.py."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tyro.conf import UseAppendAction

from ..config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What is read, what is written, and how a model computes."""

    LOWEST: ClassVar[dict[str, float]] = {"limit": 1, "max_length": 2, "batch_size": 1}

    dataset: str
    """JSON lines (plain or .gz), Parquet, or the name of a `datasets` data set; left as it is."""
    output: str
    """New file: .parquet where the data set is such a file, else .jsonl or .jsonl.gz. After a kill
    the same command continues where it was."""
    dataset_split: str = "train"
    """Split of `dataset` (only for `datasets` names)."""
    limit: int | None = None
    """Use only the first rows of `dataset`."""
    column: UseAppendAction[tuple[str, ...]] = ()
    """A text and the column it stands in, as prompt=question; may be given several times."""
    prep: tuple[str, ...] = ()
    """Functions of prefkern.prep that the rows go through, in turn, before they are written: NAME,
    or NAME:argument=value,argument=value."""
    overwrite: bool = False
    """Replace `output` where it exists, and drop what a command with other options left of it."""
    max_length: int = 1024
    """Prompt plus answer in tokens. Log-probabilities are of the tokens up to there, as in
    training; for a reward model a longer text has no score (null)."""
    batch_size: int = 16
    """Rows between two saves of what is done, and prompts that are answered at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the models' weights in memory."""
    bf16: bool = False
    """Compute log-probabilities in bfloat16 (autocast) over weights of type `dtype`."""
    attn_implementation: str | None = None
    """transformers' attention: eager, sdpa, flash_attention_2, ... (default: the model's own)."""
    backend: str = "auto"
    """Backend of the fused ops: auto, eager, cpu, triton, cuda."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes an accelerator when there is one."""
    disable_tqdm: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        for kind in reversed(type(self).__mro__):
            for name, low in vars(kind).get("LOWEST", {}).items():
                value = getattr(self, name)
                if value is not None and not low <= value < math.inf:
                    raise ValueError(f"{name} must be a finite number >= {low}, got {value}.")

    def training(self, model: str, **options: Any) -> TrainConfig:
        """The options of a run that reads the same tokens with the same arithmetic."""
        return TrainConfig(
            model=model, dataset=self.dataset, max_length=self.max_length, dtype=self.dtype,
            bf16=self.bf16, attn_implementation=self.attn_implementation, backend=self.backend,
            device=self.device, disable_tqdm=self.disable_tqdm,
            per_device_eval_batch_size=self.batch_size, **options,
        )  # fmt: skip

    def decisive(self) -> dict[str, Any]:
        """The options that the numbers depend on: with others, what is done cannot be continued."""
        free = ("output", "overwrite", "prep", "disable_tqdm", "dataset", "limit")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(TableOptions):
    """Scores stored answers: pairs, lists or single ones, into columns of a new file.

    Exactly one source of scores: --judge-model (a reward model), --judge (a Python function),
    --model with --ref-model (the implicit reward), or --model alone (mean log-probability).
    """

    LOWEST: ClassVar[dict[str, float]] = {"beta": 0.0}

    name: str = "score"
    """Column of the scores: chosen_NAME and rejected_NAME of pairs, or NAME itself with {answer} in
    it (margin_reward_{answer}); NAME, one number per answer, of lists; NAME of single answers."""
    margin: str | None = None
    """Pairs: column of the score of chosen minus that of rejected."""
    judge: str | None = None
    """module:function or file.py:function, called with (row, answers) and returning for each answer
    a number, or a list of numbers."""
    judge_model: str | None = None
    """Reward model (sequence classification): one number per answer, or as many as it has
    outputs."""
    model: tuple[str, ...] = ()
    """Causal model: with ref_model the implicit reward beta * log(model / ref_model), summed over
    the answer; alone the mean log-probability per token, of several models the mean of theirs."""
    ref_model: str | None = None
    """The model that the implicit reward compares with."""
    beta: float = 0.1
    """Factor of the implicit reward."""
    append_eos: bool = True
    """Log-probabilities of plain-text answers include that of an EOS behind them, as in
    training."""

    def check(self) -> None:
        """Raises ValueError for options that do not go together, with what to do."""
        given = [self.judge is not None, self.judge_model is not None, bool(self.model)]
        if sum(given) != 1:
            raise ValueError(
                "give exactly one source of scores: --judge-model (a reward model), --judge (a "
                "function), or --model (with --ref-model its implicit reward, alone its mean "
                "log-probability)."
            )
        if self.ref_model is not None and len(self.model) != 1:
            raise ValueError(
                f"ref_model makes the implicit reward of one model, got {len(self.model)} under "
                "--model; give one --model, or drop --ref-model."
            )
        if not self.name or self.margin == "":
            raise ValueError("name and margin must not be empty; they name columns.")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(TableOptions):
    """Samples answers to the prompts of a data set into a new file: the columns `completions` and
    `finished`, and `scores` where a judge is given. Columns of other answers are left out."""

    LOWEST: ClassVar[dict[str, float]] = {
        "num_generations": 1, "max_new_tokens": 1, "temperature": 0.0, "seed": 0,
    }  # fmt: skip

    model: str
    """Causal language model: folder or hub name (transformers)."""
    num_generations: int = 4
    """Answers per prompt."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus of the sampling; 1 samples from the whole distribution."""
    seed: int = 42
    """Of the sampling: the same seed and batch_size give the same answers."""
    distinct: bool = False
    """Leave out answers that repeat an earlier one of the same prompt, and blank ones."""
    drop_unfinished: bool = False
    """Leave out answers that max_new_tokens cut off."""
    judge: str | None = None
    """Scores the answers: module:function or file.py:function, called with (row, answers)."""
    judge_model: str | None = None
    """Scores the answers: a reward model (sequence classification)."""

    def check(self) -> None:
        """Raises ValueError for options that do not go together, with what to do."""
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.temperature == 0.0 and self.num_generations > 1:
            raise ValueError(
                "temperature=0 gives the same answer every time; use a temperature above 0 for "
                "num_generations > 1."
            )
        if self.max_new_tokens + 2 > self.max_length:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt within "
                f"max_length={self.max_length}; raise max_length."
            )
        if self.judge is not None and self.judge_model is not None:
            raise ValueError("judge and judge_model are two sources of scores; give one.")
