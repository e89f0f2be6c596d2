"""`prefkern demo`: a small language model learns from preferences on a CPU, in about a minute.

First plain likelihood on demonstrations of which most are wrong, then `tdpo2` on pairs, through the
same trainer as `prefkern train`. What comes out is measured on questions that neither part saw.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import linear_logps
from ..integrations.head import at_head
from ..integrations.head_view import View
from ..integrations.token_pictures import write_html, write_png
from ..integrations.token_view import view_pair
from . import demo_task
from .config import TrainConfig
from .data import Example, Loader, collate, length_baseline, plan_batches
from .demo_report import MEASURES, introduction, report
from .forward import inputs_of
from .output import Output, check_writable, read_mark
from .plots import Panel, plot_history

MAX_LENGTH = 32  # the longest row has 21 tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """Sizes of the demonstration. The defaults take about a minute on two cores."""

    seed: int = 0
    likelihood_steps: int = 600
    likelihood_batch: int = 64
    likelihood_learning_rate: float = 2e-3
    pairs: int = 2048
    held_out: int = 500
    steps: int = 192
    batch: int = 32
    learning_rate: float = 2e-4
    beta: float = 0.1
    alpha: float = 0.5
    measure_steps: int = 16


SHOWN = 4  # questions whose answers are printed


def run_demo(
    output_dir: str | Path = "prefkern-demo",
    settings: DemoSettings | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs the demonstration and returns the numbers it printed, also written to demo.json.

    Args:
        output_dir: Data, the two models, the log and the pictures go here; what an earlier
            demonstration wrote there is replaced.
        settings: Sizes; default `DemoSettings()`.
        say: Receives each line of the report.

    Raises:
        ValueError: output_dir holds anything else than an earlier demonstration.
    """
    folder = Path(output_dir)
    check_writable(folder)
    mark = read_mark(folder) or {}
    if folder.is_dir() and any(folder.iterdir()) and "demo.json" not in mark.get("made", ()):
        raise ValueError(
            f"{folder} holds files that no demonstration wrote; name a new folder (--output-dir)."
        )
    output = Output(folder, continues=True)  # what it made is replaced
    try:
        output.will_make(["data", "likelihood", "tdpo2", "demo.json", "demo.png"])
        output.will_make(["tokens.png", "tokens.html"])
        with _one_thread(), _quiet_transformers():
            return _run(folder, settings or DemoSettings(), say)
    finally:
        output.close()


def _run(folder: Path, settings: DemoSettings, say: Callable[[str], None]) -> dict[str, Any]:
    started = time.perf_counter()
    tokenizer = demo_task.make_tokenizer()
    data = demo_task.make_data(
        settings.seed,
        settings.likelihood_steps * settings.likelihood_batch,
        settings.pairs,
        settings.held_out,
    )
    _write_lines(folder / "data" / "pairs.jsonl", data.pairs)
    _write_lines(folder / "data" / "held_out.jsonl", data.held_out)
    loader = Loader(tokenizer=tokenizer, strict=True)
    held_out = loader.load(folder / "data" / "held_out.jsonl").examples
    model = demo_task.make_model(tokenizer, settings.seed)
    for line in introduction(data, sum(p.numel() for p in model.parameters())):
        say(line)
    likelihood = fit_likelihood(model, tokenizer, data.demonstrations, settings, say)
    model.save_pretrained(folder / "likelihood")
    tokenizer.save_pretrained(folder / "likelihood")

    say(f"\n2. tdpo2: {len(data.pairs)} pairs of a right and a wrong answer")
    log = fit_preferences(folder, settings)
    questions = data.held_out_questions
    history = [{"step": 0, **measure(model, tokenizer, held_out, questions, settings.seed)}]
    for step, path in _checkpoints(folder / "tdpo2"):
        found = measure(_load(path), tokenizer, held_out, questions, settings.seed)
        history.append({"step": step, **found})
        shutil.rmtree(path)  # measured, and the final weights lie in the folder above
    trained = _load(folder / "tdpo2")
    tokens = _token_pictures(folder, trained, model, tokenizer, data.held_out[0], settings)
    panel = Panel("demo", "On held-out questions", "share", MEASURES, 0.5, (-0.02, 1.02))
    pictures = plot_history(history, folder, panels=(panel,)).files
    result = {
        "before": history[0],
        "after": history[-1],
        "length_baseline": length_baseline(held_out),
        "history": history,
        "likelihood": likelihood,
        "kl": {side: _last(log, f"eval_kl/{side}") for side in ("chosen", "rejected")},
        "tokens_per_second": _mean_of(log, "perf/tokens_per_second"),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": time.perf_counter() - started,
        "answers": _both_answers(model, trained, tokenizer, questions[:SHOWN]),
        "pictures": [
            str(path) for path in [*pictures, *tokens, *sorted((folder / "tdpo2").glob("*.png"))]
        ],
    }
    (folder / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for line in report(result, len(held_out)):
        say(line)
    return result


def _both_answers(
    before: Any, after: Any, tokenizer: Any, questions: list[demo_task.Question]
) -> list[dict[str, str]]:
    """What both models answer to some questions."""
    pairs = zip(
        questions,
        _answers(before, tokenizer, questions),
        _answers(after, tokenizer, questions),
        strict=True,
    )
    return [
        {"prompt": question.prompt, "right": " ".join(question.right), "before": a, "after": b}
        for question, a, b in pairs
    ]


def fit_likelihood(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    settings: DemoSettings,
    say: Callable[[str], None],
) -> dict[str, float]:
    """One pass of plain maximum likelihood over the completions, through `linear_logps`."""
    loader = Loader(tokenizer=tokenizer, max_length=MAX_LENGTH, strict=True)
    examples = loader.load(rows).examples
    plan = plan_batches(
        examples, seed=settings.seed, groups_per_batch=settings.likelihood_batch, drop_last=True
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.likelihood_learning_rate, weight_decay=0.01
    )
    # 20 steps of warm-up, then down to a tenth.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 20) * (1 - 0.9 * i / len(plan))
    )
    started, tokens, loss = time.perf_counter(), 0, torch.zeros(())
    model.train()
    for step, indices in enumerate(plan, start=1):
        batch = _padded([examples[i] for i in indices], tokenizer)
        loss = -_logp(model, batch).sum() / batch.num_scored
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch.num_tokens
        if step % max(1, len(plan) // 6) == 0:
            say(f"   step {step:4d}   {loss.item():.3f} nats per token")
    model.eval()
    seconds = time.perf_counter() - started
    return {"loss": loss.item(), "tokens_per_second": tokens / seconds}


def fit_preferences(folder: Path, settings: DemoSettings) -> list[dict[str, Any]]:
    """tdpo2 by the trainer, from folder/likelihood to folder/tdpo2; the rows of its log."""
    from . import train

    config = TrainConfig(
        model=str(folder / "likelihood"),
        dataset=str(folder / "data" / "pairs.jsonl"),
        eval_dataset=str(folder / "data" / "held_out.jsonl"),
        output_dir=str(folder / "tdpo2"),
        overwrite_output_dir=True,
        loss=("tdpo2",),
        loss_args={"beta": settings.beta, "alpha": settings.alpha},
        max_length=MAX_LENGTH,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=100,
        # Sequences of nearly one length: padding costs less than attention over one packed row.
        packing="off",
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        warmup_ratio=0.1,
        logging_steps=4,
        eval_steps=settings.measure_steps,
        save_steps=settings.measure_steps,
        seed=settings.seed,
        device="cpu",
        disable_tqdm=not sys.stderr.isatty(),
    )
    return train(config)["log_history"]


@torch.no_grad()
def measure(
    model: Any,
    tokenizer: Any,
    pairs: list[Example],
    questions: list[demo_task.Question],
    seed: int,
) -> dict[str, float]:
    """What the model prefers and what it answers, no reference model in it.

    Returns:
        preference_accuracy: share of pairs whose right answer has the higher log-probability;
        greedy_right, sampled_right: share of questions of which every number is answered right, by
        the most probable tokens and by one sample at temperature 1.
    """
    preferred = 0
    for i in range(0, len(pairs), 100):
        batch = _padded(pairs[i : i + 100], tokenizer)
        logp = _logp(model, batch).double().sum(-1)  # [2P], chosen and rejected in turn
        preferred += int((logp[0::2] > logp[1::2]).sum())
    generator = torch.Generator().manual_seed(seed)
    return {
        "preference_accuracy": preferred / len(pairs),
        "greedy_right": _right_answers(model, tokenizer, questions, None),
        "sampled_right": _right_answers(model, tokenizer, questions, generator),
    }


def _right_answers(
    model: Any,
    tokenizer: Any,
    questions: list[demo_task.Question],
    generator: torch.Generator | None,
) -> float:
    right = [
        said == " ".join(question.right)
        for question, said in zip(
            questions, _answers(model, tokenizer, questions, generator), strict=True
        )
    ]
    return sum(right) / len(questions)


@torch.no_grad()
def _answers(
    model: Any,
    tokenizer: Any,
    questions: list[demo_task.Question],
    generator: torch.Generator | None = None,  # None: the most probable tokens
) -> list[str]:
    """The numbers that the model answers to each question."""
    said: dict[demo_task.Question, str] = {}
    for count in sorted({len(question.numbers) for question in questions}):
        # Prompts of one length, so that nothing needs padding.
        group = [question for question in questions if len(question.numbers) == count]
        ids = torch.tensor(tokenizer([question.prompt for question in group])["input_ids"])
        start = ids.shape[1]
        for _ in range(count):
            logits = model(ids, use_cache=False).logits[:, -1]  # [B, V]
            if generator is None:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, token), dim=1)
        for question, row in zip(group, ids[:, start:].tolist(), strict=True):
            said[question] = " ".join(tokenizer.convert_ids_to_tokens(row))
    return [said[question] for question in questions]


def _token_pictures(
    folder: Path,
    policy: Any,
    reference: Any,
    tokenizer: Any,
    pair: dict[str, str],
    settings: DemoSettings,
) -> list[Path]:
    """One held-out pair token by token, as the loss sees it after training."""
    view = view_pair(
        policy, reference, tokenizer, pair, loss="tdpo2", alpha=settings.alpha, beta=settings.beta,
        title="A held-out pair after tdpo2, token by token",
    )  # fmt: skip
    return [write_png(view, folder / "tokens.png"), write_html(view, folder / "tokens.html")]


def _padded(examples: list[Example], tokenizer: Any) -> Any:
    return collate(examples, packed=False, pad_id=tokenizer.pad_token_id)


def _logp(model: Any, batch: Any) -> torch.Tensor:  # [B, T], 0 where nothing is scored
    def logps(view: View) -> torch.Tensor:
        stats = linear_logps(view.hidden, view.head, batch.targets, num_scored=batch.num_scored)
        assert stats.logp is not None
        return stats.logp

    with inputs_of(model, batch) as inputs:
        return model(**inputs, at_head=logps).value


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(path.name.split("-")[1]), path) for path in folder.glob("checkpoint-*")]
    return sorted(found)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    at_head(model)
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    """The products of this model are so small that a second thread mostly waits: measured on two
    cores 22 500 tokens/s with one thread, 13 600 with two, and far less where others compute.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars for files of a megabyte; the setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _mean_of(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values)


def _last(rows: list[dict[str, Any]], key: str) -> float:
    return next(row[key] for row in reversed(rows) if key in row)
