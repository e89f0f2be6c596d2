"""Rounds: runs of the loop one after the other, each from the model the one before ended with.

Round n lives in output_dir/round-n, a run like any other: its data (data.jsonl where the round
made them), log, checkpoints and final model. Optimizer, schedule and loss states start afresh in
each, so two rounds are exactly two runs of which the second was given the first one's model (and,
as round_reference says, its reference). rounds.json tells which rounds are done; an interrupted run
continues with resume_from_checkpoint=auto.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..integrations import hf
from ..prep import curriculum, split_stages
from . import checkpoint as ckpt
from . import checks, judges, models, online, sampling, sync
from .config import TrainConfig, check_same_run
from .data.read import read_rows
from .loop import train_run
from .reference import Needs
from .run import make_accelerator, prepare

STATE, DATA, MADE = "rounds.json", "data.jsonl", "data.json"
# Of a round's folder, what is not part of its final model.
_NOT_MODEL = {"log_history.jsonl", "trainer_state.json", DATA, MADE}
# Beside what a round sets itself: options that mean something to the sequence of rounds alone.
_PLAIN: dict[str, Any] = {
    "num_rounds": 1, "round_data": "same", "round_reference": "previous",
    "round_extrapolation": 0.0, "judge": None, "judge_model": None, "judge_ref_model": None,
    "generation_mixture": 0.0, "soft_judge": False, "keep_unfinished": False,
    "prompts_per_round": None,
}  # fmt: skip


def train_rounds(config: TrainConfig) -> dict[str, Any]:
    """Runs every round; the last one's model ends up in output_dir.

    Returns:
        The last row of the log and `log_history`, whose rows carry `round` and the steps of all
        rounds so far.

    Raises:
        ValueError: options that do not go together, output of an earlier run, bad data.
    """
    out = Path(config.output_dir)
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process
    records = checks.check_losses(config)
    if config.round_data == "online":
        online.kind_of(records)
    done = _resume(config, out)
    accelerator.wait_for_everyone()
    if main:
        if not done and config.overwrite_output_dir:
            for folder in out.glob("round-*"):
                shutil.rmtree(folder)
            (out / STATE).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
    stages = _stages(config) if config.round_data == "stages" else []
    count = (
        len(stages)
        if config.round_data == "stages" and not config.num_rounds
        else config.num_rounds
    )
    if stages and count > len(stages):
        raise ValueError(f"num_rounds={count}, but the data have {len(stages)} stages.")

    if main:  # before the first round: what it makes is of these options
        _write_json(out / STATE, {"config": config.as_dict(), "rounds": done})
    history: list[dict[str, Any]] = [row for entry in done for row in entry["log"]]
    final: dict[str, Any] = done[-1]["final"] if done else {}
    start = done[-1]["next"] if done else config.model
    ended = done[-1]["ended"] if done else config.model
    for number in range(len(done), count):
        folder = out / f"round-{number}"
        accelerator.wait_for_everyone()
        rows: list[dict[str, Any]] = []
        if config.round_data == "stages":
            _write_once(folder, lambda number=number: (stages[number], {}), main)
        elif config.round_data == "online":
            made = _online_data(config, number, start, folder, accelerator, records)
            rows.append({"online/" + k: v for k, v in made.items()})
        accelerator.wait_for_everyone()
        run = prepare(round_config(config, number, start, has_data=config.round_data != "same"))
        run.say(f"round {number + 1} of {count}: from {start}, data {run.config.dataset}")
        final = train_run(run, final_run=False)
        rows += final.pop("log_history")
        before = history[-1]["step"] if history else 0
        shifted = [{**r, "step": before + r.get("step", 0), "round": number} for r in rows]
        history += shifted
        previous, ended = ended, str(folder)
        del run
        if config.round_extrapolation:
            target = folder / "extrapolated"
            if main:
                _extrapolate(config, ended, previous, target)
            start = str(target)
        else:
            start = ended
        final = {**final, "step": history[-1]["step"], "round": number}
        done.append({"log": shifted, "final": final, "next": start, "ended": ended})
        accelerator.wait_for_everyone()
        if main:
            _write_json(out / STATE, {"config": config.as_dict(), "rounds": done})
    if main:
        _finish(config, out, Path(start), history)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {**final, "log_history": history}


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
        records = checks.check_losses(config)
        kind, made = online.kind_of(records), folder / MADE
        names = online.BROUGHT.get(kind, ())
        if kind == "rto":  # its rewards stand in the round's rows
            changes["aux_model"] = None
        if kind == "fdpg" and made.is_file():
            changes["loss_args"] = {"baseline": ckpt.read_json(made)["baseline"]} | config.loss_args
        if config.soft_judge:
            names = (*names, "preference_prob")
        changes["columns"] = {name: name for name in names} | config.columns
    needs = Needs.of(config.loss, config.loss_args, config.columns)
    compared = (needs.reference or needs.distribution) and not needs.teacher
    if number and compared:
        if config.round_reference == "previous":
            changes["ref_model"] = start
        elif not _base_is_start(config):
            changes["ref_model"] = config.ref_model or config.model
    return dataclasses.replace(config, **changes)


def describe_rounds(config: TrainConfig) -> str:
    """What --dry-run shows: the configuration, and of the first round what is known beforehand."""
    facts: dict[str, Any] = {"config": config.as_dict(), "rounds": config.num_rounds}
    if config.round_data == "stages":
        facts["stages"] = [len(stage) for stage in _stages(config)]
        facts["rounds"] = config.num_rounds or len(facts["stages"])
    elif config.round_data == "online":
        facts["prompts"] = len(_rows(config))
        facts["rows"] = online.kind_of(checks.check_losses(config))
    else:
        facts["first_round"] = prepare(round_config(config, 0, config.model)).facts
    return json.dumps(facts, indent=2)


def _base_is_start(config: TrainConfig) -> bool:
    """Whether the first round's reference is the policy without its adapter, in every round."""
    fresh = config.lora_r > 0 and not (Path(config.model) / "adapter_config.json").is_file()
    return (
        fresh
        and config.ref_model is None
        and config.reference != "model"
        and not config.sync_ref_model
    )


def _resume(config: TrainConfig, out: Path) -> list[dict[str, Any]]:
    """What the finished rounds of an interrupted run left; refuses another run's."""
    resume = config.resume_from_checkpoint
    if resume is not None and resume.lower() not in ("auto", "true"):
        raise ValueError(
            f"a run of rounds continues with resume_from_checkpoint=auto, got {resume!r}."
        )
    if resume is None:
        if not config.overwrite_output_dir and any(out.glob("round-*")):
            raise ValueError(
                f"{out} holds rounds of an earlier run; pass --resume-from-checkpoint auto to "
                "continue it, --overwrite-output-dir to start afresh, or another --output-dir."
            )
        return []
    if not (out / STATE).is_file() or not any(out.glob("round-*")):
        return []
    saved = ckpt.read_json(out / STATE)
    check_same_run(saved["config"], config)
    return saved["rounds"]


def _rows(config: TrainConfig) -> list[dict[str, Any]]:
    """The readable rows of the data set."""
    rows = []
    for row in read_rows(config.dataset, config.dataset_split):
        if row.data is not None:
            rows.append(dict(row.data))
        elif config.strict:
            raise ValueError(f"{row.where}: {row.detail} (strict: every row must be usable).")
        if len(rows) == config.limit:
            break
    if not rows:
        raise ValueError(f"{config.dataset} has no readable row.")
    return rows


def _stages(config: TrainConfig) -> list[list[dict[str, Any]]]:
    """Rows by their column `stage`, or the stages that Curry-DPO makes of ranked lists."""
    rows = _rows(config)
    return split_stages(rows if "stage" in rows[0] else curriculum(rows, ties="skip"))


def _online_data(
    config: TrainConfig, number: int, start: str, folder: Path, accelerator: Any, records: Any
) -> dict[str, float]:
    """Samples, judges and writes a round's data; returns what to log."""
    stored = folder / MADE
    if stored.is_file() and config.resume_from_checkpoint is not None:
        return ckpt.read_json(stored)
    rows = _rows(config)
    if config.prompts_per_round is not None:
        first = number * config.prompts_per_round
        rows = [rows[(first + i) % len(rows)] for i in range(config.prompts_per_round)]
    device = accelerator.device
    tokenizer = models.load_tokenizer(start)
    policy = models.load_model(start, config).to(device).eval()

    def other(name: str) -> hf.Model:
        return models.freeze(models.load_model(name, config)).to(device)

    kind = online.kind_of(records)
    reference = None
    if config.generation_mixture or kind in ("fdpg", "rto"):
        name = round_config(config, number, start).ref_model
        on_policy = name is None and _base_is_start(config) and hasattr(policy, "peft_config")
        reference = None if on_policy else other(name or config.model)
    rows = _fitting(rows, tokenizer, policy, config)
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    answers = sampling.sample_answers(
        policy, tokenizer, mine,
        num_generations=config.num_generations, max_new_tokens=config.max_new_tokens,
        seed=config.seed + 1000 * number + accelerator.process_index,
        temperature=config.generation_temperature, top_p=config.generation_top_p,
        batch_size=config.generation_batch_size, reference=reference,
        mixture=config.generation_mixture,
    )  # fmt: skip
    if accelerator.num_processes > 1:
        everyone: list[Any] = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(everyone, answers)
        answers = [everyone[i % len(everyone)][i // len(everyone)] for i in range(len(rows))]
    made: dict[str, float] = {}
    if accelerator.is_main_process:
        if config.judge == "implicit":
            judge_ref = other(str(config.judge_ref_model))
            judge = judges.implicit_judge(policy, judge_ref, tokenizer, config)
        elif config.judge_model is not None:
            judge = judges.scorer_judge(judges.RewardModel(config.judge_model, config, device))
        else:
            judge = judges.scorer_judge(judges.load_scorer(str(config.judge)), str(config.judge))
        least = 1 if kind in ("fdpg", "rto") else 2
        lists, report = online.judged_lists(
            rows, answers, judge, keep_unfinished=config.keep_unfinished, least=least,
            distinct=kind in ("pairs", "lists"),
        )  # fmt: skip
        print(f"round {number + 1}: {report}")
        table = online.training_rows(
            lists, records, config, policy=policy, tokenizer=tokenizer, reference=reference,
            off=policy.disable_adapter if hasattr(policy, "peft_config") else None,
            aux=other(config.aux_model) if kind == "rto" and config.aux_model else None,
        )  # fmt: skip
        made = {"score": report.score, "rows": len(table)}
        if kind == "fdpg":
            divergence = {k: v for k, v in config.loss_args.items() if k == "divergence"}
            made["baseline"] = online.fdpg_baseline(table, **divergence)
        made |= {name.replace(" ", "_"): n for name, n in report.counts.items()}
        _write_once(folder, lambda: (table, made), True, again=True)
    return made


def _fitting(
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


def _extrapolate(config: TrainConfig, ended: str, previous: str, target: Path) -> None:
    policy = models.load_model(ended, config)
    sync.extrapolate(policy, models.load_model(previous, config), config.round_extrapolation)
    target.mkdir(exist_ok=True)
    ckpt.save_weights(target, {"policy": policy}, models.load_tokenizer(ended))
    masks = Path(ended) / "masks.safetensors"
    if masks.is_file():
        shutil.copy2(masks, target)


def _write_once(folder: Path, make: Any, main: bool, *, again: bool = False) -> None:
    """Writes data.jsonl and, after it, data.json, each in one step; not twice."""
    if not main or ((folder / MADE).is_file() and not again):
        return
    folder.mkdir(parents=True, exist_ok=True)
    table, facts = make()
    partial = folder / f"{DATA}.tmp"
    partial.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    os.replace(partial, folder / DATA)
    _write_json(folder / MADE, facts)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".tmp")
    ckpt.write_json(partial, value)
    os.replace(partial, path)


def _finish(config: TrainConfig, out: Path, model: Path, history: list[dict[str, Any]]) -> None:
    """The last model and the log of all rounds into the output folder."""
    for path in sorted(model.iterdir()):
        if path.name == "slow" and path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        elif path.is_file() and path.name not in _NOT_MODEL and path.suffix != ".png":
            shutil.copy2(path, out / path.name)
    lines = "".join(json.dumps(row) + "\n" for row in history)
    (out / "log_history.jsonl").write_text(lines, encoding="utf-8")
    if config.plots:
        from .plots import plot_history

        plot_history(history, out)
