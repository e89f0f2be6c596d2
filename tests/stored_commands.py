"""`prefkern` called in this process, and what its files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefkern.cli.main import main

QUIET = ("--device", "cpu", "--disable-tqdm", "--max-length", 96)


def prefkern(verb: str, *given: object, **options: object) -> None:
    """A command that must succeed; options as keywords, a tuple as several words."""
    words = [str(word) for word in given]
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        words += map(str, value if isinstance(value, tuple) else (value,))
    assert main([verb, *words, *map(str, QUIET)]) == 0, words


def told(capsys) -> str:
    """The one line of a mistake."""
    lines = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert len(lines) == 1, lines
    return lines[0]


def trained(model: object, data: object, out: Path, *given: object, **options: object) -> Path:
    """The folder of a model after `prefkern train`."""
    defaults: dict[str, object] = dict(
        max_steps=16, learning_rate=3e-3, per_device_train_batch_size=16, save_steps=0,
        logging_steps=5,
    )  # fmt: skip
    prefkern("train", "--no-plots", *given, model=model, dataset=data, output_dir=out,
             **defaults | options)  # fmt: skip
    return out


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(folder: Path, name: str) -> list[float]:
    return [row[name] for row in rows_of(folder / "log_history.jsonl") if name in row]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
