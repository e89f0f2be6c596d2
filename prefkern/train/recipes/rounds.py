"""Rounds: runs of the loop one after the other, each from the model the one before ended with.

Round n lives in output_dir/round-n, a run like any other: its data (data.jsonl where the round
made them), log, checkpoints and final model. Optimizer, schedule and loss states start afresh in
each, so two rounds are exactly two runs of which the second was given the first one's model (and,
as round_reference says, its reference). rounds.json tells which rounds are done; an interrupted run
continues with resume_from_checkpoint=auto.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ...prep import curriculum, split_stages
from .. import checkpoint as ckpt
from .. import demands, models, output, sources
from ..config import TrainConfig, check_same_run
from ..data.read import raw_rows
from ..data.unread import TEXTS, beside_prompts
from ..inputs import check_inputs
from ..loop import train_run
from ..output import LOG, MARK, TRAINER_STATE, Output, writing
from ..processes import make_accelerator
from ..run import Run, check_sources, say
from ..stored.source import under_read_names
from ..waiting import others_wait
from . import masks, sync, two_speeds, value_head
from .online.answers import NothingToTrain
from .online.makers import maker_of
from .online.renewal import Renewal, samplings_per_round, shared
from .online.round_data import Start, make_sampler
from .prepared import prepared_run
from .round_config import DATA, MADE, check, round_config, scored_against

STATE = "rounds.json"
# Of a round's folder, what is not part of its final model.
_NOT_MODEL = {LOG, TRAINER_STATE, MARK, DATA, MADE}
Rows = list[dict[str, Any]]


def train_rounds(config: TrainConfig) -> dict[str, Any]:
    """Runs every round; the last one's model ends up in output_dir.

    Returns:
        The last row of the log and `log_history`, whose rows carry `round` and the steps of all
        rounds so far.

    Raises:
        ValueError: options that do not go together, output of an earlier run, bad data.
    """
    check(config)
    accelerator = make_accelerator(config)
    check_sources(config)
    rounds = Rounds(config, accelerator)
    try:
        rounds.open()
        for number in range(len(rounds.done), rounds.count):
            try:
                rounds.one(number)
            except NothingToTrain as why:
                if number == 0:
                    raise
                say(rounds.accelerator, f"round {number + 1}: {why} The rounds end here.")
                break
        return rounds.finish()
    finally:
        if rounds.output is not None:
            rounds.output.close()


class Rounds:
    """The rounds of one run: what is done, and where the next one starts."""

    def __init__(self, config: TrainConfig, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.out, self.main = Path(config.output_dir), accelerator.is_main_process
        self.output: Output | None = None  # of the main process
        self.done = _resume(config, self.out)
        self.stages = _stages(config) if config.round_data == "stages" else []
        self.prompts = _prompts(config, accelerator) if config.round_data == "online" else []
        self.count = config.num_rounds or len(self.stages)
        if self.stages and self.count > len(self.stages):
            raise ValueError(
                f"num_rounds={self.count}, but the data have {len(self.stages)} stages."
            )
        self.history: Rows = [row for entry in self.done for row in entry["log"]]

    @property
    def start(self) -> str:
        """The model that the next round starts from."""
        return self.done[-1]["next"] if self.done else self.config.model

    @property
    def ended(self) -> str:
        """The model that the last round ended with."""
        return self.done[-1]["ended"] if self.done else self.config.model

    def open(self) -> None:
        """The output folder, for these options alone from here on."""
        self.accelerator.wait_for_everyone()
        if not self.main:
            return
        fresh = not self.done and self.config.overwrite_output_dir
        if fresh:
            _refuse_foreign(self.out)
        self.output = Output(
            self.out, overwrite=fresh, continues=self.config.resume_from_checkpoint is not None
        )
        if fresh:
            for folder in _rounds_in(self.out):
                shutil.rmtree(folder)
        self.output.will_make([STATE])
        self.contents = sources.contents(self.config)
        self._write()  # before the first round: what it makes is of these options

    def one(self, number: int) -> None:
        """Makes the data of a round where it has its own, and runs it."""
        config, start = self.config, self.start
        self.accelerator.wait_for_everyone()
        made = self._make_data(number)
        has_data = config.round_data != "same"
        run = prepared_run(round_config(config, number, start, has_data=has_data))
        if config.sample_every:
            run.providers.append(self._renewal(run, number))
        run.say(f"round {number + 1} of {self.count}: from {start}, data {run.config.dataset}")
        final = train_run(run, final_run=False)
        rows = [{f"online/{k}": v for k, v in made.items()}] if made else []
        rows += final.pop("log_history")
        del run
        before = self.history[-1]["step"] if self.history else 0
        shifted = [{**r, "step": before + r.get("step", 0), "round": number} for r in rows]
        self.history += shifted
        ended = str(self.out / f"round-{number}")
        final = {**final, "step": self.history[-1]["step"], "round": number}
        self.done.append(
            {"log": shifted, "final": final, "next": self._next(ended), "ended": ended}
        )
        self.accelerator.wait_for_everyone()
        if self.main:
            self._write()

    def _make_data(self, number: int) -> dict[str, float]:
        """Writes the data of a round that has its own, once; returns what to log of them.

        Raises:
            NothingToTrain: on every process, where there is nothing to learn from.
        """
        config, folder = self.config, self.out / f"round-{number}"
        made, why = dict[str, float](), ""
        with others_wait(self.accelerator), models.loaded_whole():
            if config.round_data == "stages":
                if self.main and not (folder / MADE).is_file():
                    write_round(folder, self.stages[number], {})
            elif config.round_data == "online":
                try:
                    made = self._sampled(number, folder)
                except NothingToTrain as error:
                    why = str(error)
                except ValueError as error:
                    if not number:
                        raise
                    raise ValueError(
                        f"{error} Rounds 1 to {number} are done, their model is {self.start}."
                    ) from error
        if told := shared(self.accelerator, why):
            raise NothingToTrain(told)
        return made

    def _sampled(self, number: int, folder: Path) -> dict[str, float]:
        if (folder / MADE).is_file() and self.config.resume_from_checkpoint is not None:
            return ckpt.read_json(folder / MADE)
        maker = maker_of(self.config, demands.losses_of(self.config))
        sampler = make_sampler(
            self.config, self.prompts, self._begins(number), maker, self.accelerator
        )
        table, made = sampler.rows(number)
        if self.main:
            write_round(folder, table, made)
        return made

    def _begins(self, number: int) -> Start:
        """What a round's samples are drawn from and scored against."""
        first = number * samplings_per_round(self.config)
        return Start(first, self.start, scored_against(self.config, number, self.start))

    def _renewal(self, run: Run, number: int) -> Renewal:
        maker = maker_of(self.config, demands.losses_of(self.config))
        sampler = make_sampler(
            self.config, self.prompts, self._begins(number), maker, self.accelerator,
            policy=run.step.policy, tokenizer=run.tokenizer, reference=run.reference.model,
            value=cast(Any, run.step.trained().get(value_head.NAME)),
        )  # fmt: skip
        return Renewal(sampler, run, first=number * samplings_per_round(self.config))

    def _next(self, ended: str) -> str:
        """Where the next round starts: at this one's model, or beyond it."""
        if not self.config.round_extrapolation:
            return ended
        target = Path(ended) / "extrapolated"
        if self.main:
            _extrapolate(self.config, ended, self.ended, target)
        return str(target)

    def _write(self) -> None:
        state = {"config": self.config.as_dict(), "rounds": self.done, "contents": self.contents}
        _write_json(self.out / STATE, state)

    def finish(self) -> dict[str, Any]:
        """The last model and the log of all rounds into the output folder."""
        if self.output is not None:
            with writing(self.out):
                building = self.output.partial("final")
                _copy_model(Path(self.start), building)
                lines = "".join(json.dumps(row) + "\n" for row in self.history)
                (building / LOG).write_text(lines, encoding="utf-8")
                self.output.install(building)
            if self.config.plots:
                from ..plots import plot_history

                plotted = plot_history(self.history, self.out)
                self.output.will_make(path.name for path in plotted.files)
            self.output.finish()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        final = self.done[-1]["final"] if self.done else {}
        return {**final, "log_history": self.history}


def describe_rounds(config: TrainConfig) -> str:
    """What --dry-run shows: the configuration, and of the first round what is known beforehand."""
    check(config)
    facts: dict[str, Any] = {"config": config.as_dict(), "rounds": config.num_rounds}
    if config.round_data == "stages":
        facts["stages"] = [len(stage) for stage in _stages(config)]
        facts["rounds"] = config.num_rounds or len(facts["stages"])
    elif config.round_data == "online":
        facts["prompts"] = len(_rows(config))
        facts["rows"] = maker_of(config, demands.losses_of(config)).name
    else:
        facts["first_round"] = prepared_run(round_config(config, 0, config.model)).facts
    return json.dumps(facts, indent=2)


def _resume(config: TrainConfig, out: Path) -> list[dict[str, Any]]:
    """What the finished rounds of an interrupted run left; refuses another run's."""
    resume = config.resume_from_checkpoint
    if resume is not None and resume.lower() not in ("auto", "true"):
        raise ValueError(
            f"a run of rounds continues with resume_from_checkpoint=auto, got {resume!r}."
        )
    check_inputs(config)
    if resume is None or not (out / STATE).is_file():
        output.check_free(
            out,
            overwrite=config.overwrite_output_dir,
            auto=resume is not None,
            names=output.NAMES | {STATE},
            patterns=("round-*",),
        )
    if resume is None:
        return []
    if not (out / STATE).is_file() or not any(out.glob("round-*")):
        return []
    saved = ckpt.read_json(out / STATE)
    check_same_run(saved["config"], config)
    sources.check_same(saved["contents"], config)
    return saved["rounds"]


def _rounds_in(out: Path) -> list[Path]:
    return [p for p in sorted(out.glob("round-*")) if re.fullmatch(r"round-\d+", p.name)]


def _refuse_foreign(out: Path) -> None:
    """A folder round-N without a run's mark or its data is nobody's to remove here."""
    for path in _rounds_in(out):
        if path.is_symlink() or not ((path / MARK).is_file() or (path / MADE).is_file()):
            raise ValueError(
                f"{path} was not written by this trainer and is not removed; move it away, or "
                "choose another --output-dir."
            )


def _rows(config: TrainConfig) -> Rows:
    """The readable rows of the data set."""
    rows = []
    for row in raw_rows(config.dataset, config.dataset_split):
        if row.data is not None:
            rows.append(dict(row.data))
        elif config.strict:
            raise ValueError(f"{row.where}: {row.detail} (strict: every row must be usable).")
        if len(rows) == config.limit:
            break
    if not rows:
        raise ValueError(f"{config.dataset} has no readable row.")
    return rows


def _prompts(config: TrainConfig, accelerator: Any) -> Rows:
    """The rows whose prompts are answered, with their texts under the names that are read.

    Raises:
        ValueError: a row holds pictures or sound that are not read.
    """
    renamed = {name: column for name, column in config.columns.items() if name in TEXTS}
    rows = [under_read_names(row, renamed) for row in _rows(config)]
    known = maker_of(config, demands.losses_of(config)).keeps
    named = ((f"{config.dataset}, row {i}", row) for i, row in enumerate(rows, 1))
    if note := beside_prompts(named, known):
        say(accelerator, note)
    return rows


def _stages(config: TrainConfig) -> list[Rows]:
    """Rows by their column `stage`, or the stages that Curry-DPO makes of ranked lists."""
    rows = _rows(config)
    if "stage" in rows[0]:
        return split_stages(rows)
    if not {"responses", "completions"} & rows[0].keys():
        raise ValueError(
            "round_data=stages needs a column stage (a whole number per row), or ranked lists of "
            f"which stages are made; the columns found: {', '.join(map(repr, rows[0]))}."
        )
    return split_stages(curriculum(rows, ties="skip"))


def _extrapolate(config: TrainConfig, ended: str, previous: str, target: Path) -> None:
    policy = models.load_model(ended, config)
    sync.extrapolate(policy, models.load_model(previous, config), config.round_extrapolation)
    target.mkdir(exist_ok=True)
    load = models.load_tokenizer if config.image_column is None else models.load_processor
    ckpt.save_weights(target, {"policy": policy}, load(ended))
    for name in (masks.FILE, value_head.FILE):
        if (Path(ended) / name).is_file():
            shutil.copy2(Path(ended) / name, target)


def write_round(folder: Path, table: Rows, facts: dict[str, float]) -> None:
    """Writes data.jsonl and, after it, data.json, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in table)
    _in_one_step(folder / DATA, lambda partial: partial.write_text(lines, encoding="utf-8"))
    _write_json(folder / MADE, facts)


def _write_json(path: Path, value: Any) -> None:
    _in_one_step(path, lambda partial: ckpt.write_json(partial, value))


def _in_one_step(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".prefkern-{path.name}.tmp")
    with writing(path):
        write(partial)
        os.replace(partial, path)


def _copy_model(model: Path, out: Path) -> None:
    for path in sorted(model.iterdir()):
        if path.name == two_speeds.SLOW and path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        elif path.is_file() and path.name not in _NOT_MODEL and path.suffix != ".png":
            shutil.copy2(path, out / path.name)
