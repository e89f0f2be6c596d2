"""One round of a run of rounds as a run of its own, and the options that go with rounds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .. import checkpoint as ckpt
from .. import demands
from ..config import TrainConfig
from ..data.unread import TEXTS
from ..run import plan
from .online.makers import maker_of
from .options import OnlineOptions

DATA, MADE = "data.jsonl", "data.json"  # of a round that makes its own data
# Options that mean something to the sequence of rounds alone, as one run of them has them.
_PLAIN = {option.name: option.default for option in dataclasses.fields(OnlineOptions)}


def check(config: TrainConfig) -> None:
    """Raises ValueError for options that contradict each other, with what to do."""
    moves = config.round_reference == "previous" and config.num_rounds != 1
    if (moves or config.round_data != "same") and (
        config.precomputed_ref or config.reference == "columns"
    ):
        raise ValueError(
            "precomputed reference log-probabilities are those of one model on one data set, and "
            "rounds change the reference or the data; drop precomputed_ref (or the columns): each "
            "round then computes its reference."
        )
    if moves and config.reference == "adapter":
        raise ValueError(
            "reference=adapter is always the base model, so the model of the previous round cannot "
            "be the reference; use reference=model or auto, or round_reference=start."
        )
    if moves and config.sync_ref_model and config.lora_r:
        raise ValueError(
            "with lora_r the reference of the second round would be an adapter, whose weights "
            "sync_ref_model cannot move; use round_reference=start."
        )
    if config.round_extrapolation and config.lora_r:
        raise ValueError(
            "round_extrapolation works on the weights, and an adapter's change of them is a "
            "product of two matrices, which does not extrapolate; set lora_r=0."
        )
    stored = [
        n for n in ("fused_ref", "precomputed_aux", "precomputed_baseline") if getattr(config, n)
    ]
    if config.round_data != "same" and stored:
        raise ValueError(
            f"{' and '.join(stored)} belong to one data set; with round_data={config.round_data} "
            "every round has its own: use a model (aux_model) or columns, or round_data=same."
        )
    if config.round_data == "online" and config.score_prompt:
        raise ValueError(
            "score_prompt is for stored rows: samples are judged and weighed by the log-"
            "probabilities of the answers alone; drop it with round_data=online."
        )
    if config.round_data == "online":
        _check_online(config)
    plan(round_config(config, 0, config.model))


def _check_online(config: TrainConfig) -> None:
    """Raises ValueError for options that the rows of the losses do not go with."""
    maker = maker_of(config, demands.losses_of(config))
    maker.check()
    judged = config.judge is not None or config.judge_model is not None
    if judged != maker.judged:
        raise ValueError(
            "round_data=online scores sampled answers: give exactly one of judge and judge_model."
            if maker.judged
            else f"loss {', '.join(config.loss)} compares samples with the stored rejected answer "
            "and reads no scores; drop judge and judge_model."
        )
    if config.judge_weights is not None and config.judge == "implicit":
        raise ValueError("judge=implicit is one number per answer; drop judge_weights.")
    if config.judge_normalize != "sum" and "advantages" not in maker.makes:
        raise ValueError(
            f"judge_normalize=each is for losses over advantages; loss {', '.join(config.loss)} "
            "reads the weighted sum."
        )
    if config.sample_every and config.max_steps <= 0:
        raise ValueError(
            "sample_every samples within a round of max_steps steps; set max_steps, by which the "
            "length of a round is known whatever is sampled."
        )


def round_config(
    config: TrainConfig, number: int, start: str, *, has_data: bool = False
) -> TrainConfig:
    """The configuration of one round as a run of its own."""
    folder = Path(config.output_dir) / f"round-{number}"
    changes: dict[str, Any] = _PLAIN | {
        "model": start,
        "output_dir": str(folder),
        "seed": config.seed + number,
        "resume_from_checkpoint": config.resume_from_checkpoint and "auto",
    }
    if has_data:
        changes |= {"dataset": str(folder / DATA), "limit": None, "layout": "auto"}
    if config.round_data == "online":
        maker = maker_of(config, demands.losses_of(config))
        names = (*maker.columns, *(("preference_prob",) if config.soft_judge else ()))
        given = {k: v for k, v in config.columns.items() if k not in TEXTS}  # of the prompts' file
        changes["columns"] = {name: name for name in names} | given
        loss_args = {k: v for k, v in config.loss_args.items() if k not in maker.takes}
        changes["loss_args"] = loss_args
        if "aux" in maker.reads:  # what is read of it stands in the round's rows
            changes["aux_model"] = None
        if (folder / MADE).is_file():
            changes["loss_args"] = maker.loss_args(ckpt.read_json(folder / MADE)) | loss_args
    needs = demands.ReferenceNeeds.of(config)
    if number and needs.any and not needs.teacher:
        if config.round_reference == "previous":
            changes["ref_model"] = start
        elif not _base_is_start(config):
            changes["ref_model"] = config.ref_model or config.model
        elif config.reference == "auto":  # the base without its adapter, as in the first round
            changes["reference"] = "adapter"
    return dataclasses.replace(config, **changes)


def _base_is_start(config: TrainConfig) -> bool:
    """Whether the first round's reference is the policy without its adapter, in every round."""
    fresh = config.lora_r > 0 and not (Path(config.model) / "adapter_config.json").is_file()
    return (
        fresh
        and config.ref_model is None
        and config.reference != "model"
        and not config.sync_ref_model
    )


def scored_against(config: TrainConfig, number: int, start: str) -> str | None:
    """The reference that samples of a round are scored against; None: the policy's base model."""
    name = round_config(config, number, start).ref_model
    return name or (None if _base_is_start(config) else config.model)
