"""`prefkern score`: scores of stored answers in named columns of a new file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import models
from ..config import TrainConfig
from ..data.unread import check_there
from ..processes import make_accelerator
from ..recipes.online.judges import Scorer, load_scorer
from ..sources import content
from . import source as stored
from .options import SampleConfig, ScoreConfig, TableOptions
from .scorers import Score, open_scorer
from .source import Answers
from .work import Work, check_output
from .write import prep_steps, writer


def score(config: ScoreConfig) -> Path:
    """Writes the rows of `dataset` with the scores of their answers; returns the path.

    A row that cannot be read as the layout of the data, and an answer that the model cannot read,
    has null. What is done is kept at every batch, so that the same command continues after a kill
    or an error of the judge.

    Raises:
        ValueError: a mistake in the options or the data, with what to do; a judge that fails, or
            gives something else than finite numbers, with the row.
    """
    config.check()
    path, steps, renamed = begin(config)
    function = check_models(config, ("judge_model", "ref_model", "model"))
    source = stored.read_source(config.dataset, config.dataset_split, config.limit)
    check_there(renamed, source.rows, source.name)
    layout, answers, report = stored.read_answers(source, renamed)
    names = columns_of(config, layout)
    check_free_columns(source, [*names, *filter(None, [config.margin])])
    work = Work(path, key_of(config, source), overwrite=config.overwrite)
    try:
        if not work.finished(len(source.rows)):
            announce(f"{config.dataset}: {layout}, {report}")
            rows = [stored.under_read_names(row.data or {}, renamed) for row in source.rows]
            _score_rows(config, work, source, rows, answers, function)
            table = [row_columns(config, layout, found, names) for found in work.rows]
            nothing = sum(found is None or None in found for found in work.rows)
            if nothing == len(table):
                raise ValueError(
                    "no row has a score for every answer, so nothing is written: the prompts or "
                    "answers cannot be read, or are longer than max_length."
                )
            if nothing:
                announce(f"{nothing} of {len(table)} rows have no score for some answer (null).")
            write = writer(source, table, steps=steps, renamed=renamed)
            work.finish(write)
        work.clear()
    finally:
        work.close()
    return path


def begin(config: TableOptions) -> tuple[Path, list[Any], dict[str, str]]:
    """Output, prep functions and renamed columns, checked before anything is read."""
    if config.disable_tqdm:
        from transformers.utils import logging

        logging.disable_progress_bar()
    parquet = config.dataset.endswith(stored.PARQUET)
    path = check_output(config.output, config.dataset, parquet=parquet, overwrite=config.overwrite)
    return path, prep_steps(config.prep), stored.named_columns(config.column)


def check_models(config: ScoreConfig | SampleConfig, options: Sequence[str]) -> Scorer | None:
    """Refuses names of models that lead nowhere, before one of them is loaded; returns the judge's
    function, whose file is read once."""
    for option in options:
        value = getattr(config, option) or ()
        for name in (value,) if isinstance(value, str) else value:
            try:
                models.check_name(name)
            except ValueError as error:
                raise ValueError(f"{option}: {error}") from error
    return None if config.judge is None else load_scorer(config.judge)


def key_of(config: ScoreConfig | SampleConfig, source: stored.Source) -> dict[str, Any]:
    """What the results depend on: the options, the rows, and what models and judge hold."""
    key = config.decisive() | {"rows of the data set": source.digest()}
    for option in ("model", "ref_model", "judge_model", "judge"):
        value = getattr(config, option, None) or ()
        names = (value,) if isinstance(value, str) else value
        key[f"content of {option}"] = [content(name, option != "judge") for name in names]
    return key


def one_process(settings: TrainConfig) -> torch.device:
    """The device of the only process.

    Raises:
        ValueError: there are several.
    """
    accelerator = make_accelerator(settings)
    if accelerator.num_processes > 1:
        raise ValueError("score and sample run in one process; start them without torchrun.")
    return accelerator.device


def announce(text: str) -> None:
    print(text, file=sys.stderr)


def columns_of(config: ScoreConfig, layout: str) -> list[str]:
    """The columns of the scores: one of each answer of a pair, else one."""
    if layout != "pairs":
        if config.margin is not None:
            raise ValueError(f"margin is of pairs, and {config.dataset} holds {layout}; drop it.")
        return [config.name.replace("{answer}", "").strip("_") or "score"]
    pattern = config.name if "{answer}" in config.name else "{answer}_" + config.name
    return [pattern.replace("{answer}", answer) for answer in ("chosen", "rejected")]


def check_free_columns(source: stored.Source, names: Sequence[str]) -> None:
    """Refuses names that the data have, or that are given twice."""
    for name in names:
        taken = next((row for row in source.rows if name in (row.data or {})), None)
        if taken is not None or list(names).count(name) > 1:
            where = "is given twice" if taken is None else f"is there already ({taken.where})"
            raise ValueError(
                f"column {name!r} {where}, and no column is replaced; choose another --name or "
                "--margin."
            )


def row_columns(
    config: ScoreConfig, layout: str, found: list[Score] | None, names: Sequence[str]
) -> Mapping[str, Any]:
    """The added columns of one row."""
    if layout == "lists":
        whole = found is not None and None not in found
        return {names[0]: found if whole else None}
    values: list[Score] = found or [None] * len(names)
    columns: dict[str, Any] = dict(zip(names, values, strict=True))
    if config.margin is not None:
        columns[config.margin] = _difference(*values)
    return columns


def _difference(chosen: Score, rejected: Score) -> Score:
    if isinstance(chosen, list) and isinstance(rejected, list):
        return [a - b for a, b in zip(chosen, rejected, strict=True)]
    if isinstance(chosen, float) and isinstance(rejected, float):
        return chosen - rejected
    return None


def _score_rows(
    config: ScoreConfig,
    work: Work,
    source: stored.Source,
    rows: Sequence[dict[str, Any]],
    answers: Sequence[Answers | None],
    function: Scorer | None,
) -> None:
    """Every row that is left, batch by batch."""
    if work.rows:
        announce(f"continuing {work.output} at row {len(work.rows)} of {len(rows)}")
    if len(work.rows) == len(rows):
        return
    scores = open_scorer(config, one_process(config.training("")), function)
    with tqdm(total=len(rows), initial=len(work.rows), disable=config.disable_tqdm) as bar:
        for start in range(len(work.rows), len(rows), config.batch_size):
            batch = range(start, min(start + config.batch_size, len(rows)))
            good = [i for i in batch if answers[i] is not None]
            with kept(work, source, batch):
                given = scores([rows[i] for i in good], [a for i in good if (a := answers[i])])
                found: dict[int, list[Score]] = dict(zip(good, given, strict=True))
                _check_alike(work.rows, found.values())
            work.add([found.get(i) for i in batch])
            bar.update(len(batch))


def _check_alike(before: Sequence[Any], now: Any) -> None:
    """Refuses lists of another length, or numbers beside lists."""
    values = [value for row in (*before[:1], *now) for value in row or () if value is not None]
    sizes = {len(value) if isinstance(value, list) else 0 for value in values}
    if len(sizes) > 1:
        raise ValueError(
            "every answer must have as many scores as the others, got "
            f"{' and '.join(str(size or 'a lone number') for size in sorted(sizes))}."
        )


@contextmanager
def kept(work: Work, source: stored.Source, batch: range) -> Iterator[None]:
    """Adds to a mistake where it happened and that what was done before is kept."""
    try:
        yield
    except ValueError as error:
        first, last = (source.rows[i].where for i in (batch[0], batch[-1]))
        where = first if first == last else f"{first} to {last}"
        raise ValueError(
            f"{str(error).rstrip('.')} (rows {where}). {len(work.rows)} of {len(source.rows)} rows "
            "are done and kept; the same command continues."
        ) from error
