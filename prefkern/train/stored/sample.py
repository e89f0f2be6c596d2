"""`prefkern sample`: K answers of a model to every prompt of a data set, in a new file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...integrations import hf
from ...prep.cells import BadRow, filled, get, text
from .. import models
from ..data.unread import ANSWERS, beside_prompts, check_there
from ..recipes.answer_logps import as_completion
from ..recipes.online import sampling
from ..recipes.online.judges import Scorer
from . import source as stored
from .options import SampleConfig
from .score import announce, begin, check_models, kept, key_of, one_process
from .scorers import Scores, open_scorer
from .source import Answers
from .work import Work
from .write import writer


def write_samples(config: SampleConfig) -> Path:
    """Writes answers to the prompts of `dataset`; returns the path.

    A row becomes its prompt and other columns with `completions` [K] and `finished` [K] (whether
    the model ended the answer), and `scores` [K] of a judge. A row whose prompt leaves no room, or
    none of whose answers is kept, is left out and counted.

    Raises:
        ValueError: a mistake in the options or the data, with what to do; a judge that fails, or
            gives something else than finite numbers, with the row.
    """
    config.check()
    path, steps, renamed = begin(config)
    function = check_models(config, ("model", "judge_model"))
    source = stored.read_source(config.dataset, config.dataset_split, config.limit)
    check_there(renamed, source.rows, source.name)
    rows = [stored.under_read_names(row.data or {}, renamed) for row in source.rows]
    prompts = _prompts(source, rows)
    work = Work(path, key_of(config, source), overwrite=config.overwrite)
    try:
        if not work.finished(len(source.rows)):
            without = [n for n in ANSWERS if any(n in (r.data or {}) for r in source.rows)]
            if without:
                announce(f"columns of other answers are left out: {', '.join(without)}")
            _sample_rows(config, work, source, rows, prompts, function)
            _tell(work.rows, source)
            table = [found if found and found["completions"] else None for found in work.rows]
            if not any(table):
                raise ValueError(
                    "no prompt has an answer that is kept; raise max_new_tokens, or drop "
                    "--drop-unfinished and --distinct."
                )
            write = writer(source, table, without=without, steps=steps, renamed=renamed)
            work.finish(write)
        work.clear()
    finally:
        work.close()
    return path


def _prompts(source: stored.Source, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The prompt of every row, a text or messages.

    Raises:
        ValueError: a row has none, or holds pictures or sound.
    """
    found = []
    if note := beside_prompts(zip((raw.where for raw in source.rows), rows, strict=True), ()):
        announce(note)
    for raw, row in zip(source.rows, rows, strict=True):
        try:
            found.append(filled(text(get(row, "prompt"), "prompt"), "prompt"))
        except BadRow as why:
            raise ValueError(
                f"{raw.where} column '{why.column}': {why.detail}; --column prompt=NAME reads the "
                "prompts from another column."
            ) from None
    return found


def _tell(results: Sequence[Any], source: stored.Source) -> None:
    """What is left out of the new file."""
    long = [raw.where for raw, found in zip(source.rows, results, strict=True) if found is None]
    none = sum(found is not None and not found["completions"] for found in results)
    if long:
        announce(
            f"{len(long)} prompts leave no room for max_new_tokens within max_length or the "
            f"model's context and are left out: {', '.join(long[:5])}{' ...' * (len(long) > 5)}"
        )
    if none:
        announce(f"{none} prompts have no answer that is kept and are left out")
    cut = sum(not ended for found in results if found for ended in found["finished"])
    if cut:
        announce(f"{cut} answers were cut off at max_new_tokens (column finished is false)")


def _sample_rows(
    config: SampleConfig,
    work: Work,
    source: stored.Source,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[Any],
    function: Scorer | None,
) -> None:
    """Every row that is left, batch by batch; a batch has a seed of its own, so that a run that was
    interrupted gives the same answers."""
    if work.rows:
        announce(f"continuing {work.output} at row {len(work.rows)} of {len(rows)}")
    if len(work.rows) == len(rows):
        return
    settings = config.training(config.model)
    device = one_process(settings)
    tokenizer = models.load_tokenizer(config.model)
    policy = models.freeze(models.load_model(config.model, settings)).to(device)
    judged = config.judge is not None or config.judge_model is not None
    scores = open_scorer(config, device, function) if judged else None
    with tqdm(total=len(rows), initial=len(work.rows), disable=config.disable_tqdm) as bar:
        for start in range(len(work.rows), len(rows), config.batch_size):
            batch = range(start, min(start + config.batch_size, len(rows)))
            with kept(work, source, batch):
                given = [rows[i] | {"prompt": prompts[i]} for i in batch]
                work.add(_batch(config, given, start, policy, tokenizer, scores))
            bar.update(len(batch))


def _batch(
    config: SampleConfig,
    rows: Sequence[dict[str, Any]],
    start: int,
    policy: hf.Model,
    tokenizer: Any,
    scores: Scores | None,
) -> list[dict[str, Any] | None]:
    """The added columns of each row; None where the prompt leaves no room."""
    room = min(config.max_length, models.context_length(policy) or config.max_length)
    fits = [
        # one more: the end that training appends
        len(sampling.prompt_ids(tokenizer, row)) + config.max_new_tokens < room
        for row in rows
    ]
    asked = [row for row, fit in zip(rows, fits, strict=True) if fit]
    answers = sampling.sample_answers(
        policy, tokenizer, asked, num_generations=config.num_generations,
        max_new_tokens=config.max_new_tokens, seed=batch_seed(config.seed, start),
        temperature=config.temperature, top_p=config.top_p, batch_size=config.batch_size,
    ) if asked else []  # fmt: skip
    kept_ones = [_kept(config, given) for given in answers]
    found: list[dict[str, Any]] = [
        {
            "completions": [as_completion(row, answer.text) for answer in own],
            "finished": [answer.finished for answer in own],
        }
        for row, own in zip(asked, kept_ones, strict=True)
    ]
    if scores is not None:
        texts = [
            Answers([row["prompt"]] * len(one["completions"]), one["completions"])
            for row, one in zip(asked, found, strict=True)
        ]
        for one, values in zip(found, scores(asked, texts), strict=True):
            if None in values:
                raise ValueError("the judge cannot read an answer: raise --max-length.")
            one["scores"] = values
    each = iter(found)
    return [next(each) if fit else None for fit in fits]


def _kept(config: SampleConfig, given: Sequence[sampling.Answer]) -> list[sampling.Answer]:
    """The answers to one prompt that go into the file."""
    out: list[sampling.Answer] = []
    for answer in given:
        repeated = any(answer.text == other.text for other in out)
        if config.distinct and (repeated or not answer.text.strip()):
            continue
        if config.drop_unfinished and not answer.finished:
            continue
        out.append(answer)
    return out


def batch_seed(seed: int, start: int) -> int:
    """A seed for the batch that begins at row `start`; neighbouring seeds share none."""
    digest = hashlib.blake2b(f"{seed}:{start}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")
