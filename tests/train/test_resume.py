"""A killed run continues to the same bits: final safetensors byte-equal, same log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import config, save_model, write_data

from prefkern.train import seals, train
from prefkern.train.loop import train_run
from prefkern.train.run import Run, prepare

HERE = Path(__file__).resolve().parent
VOLATILE = {
    "perf/tokens_per_second",
    "perf/peak_memory_gib",
    "eval_runtime",
    "eval_samples_per_second",
}
COMMON = dict(
    loss=("sparsepo",),
    loss_args={"l1_norm_param_u": 1e-3},
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=7,
    save_steps=2,
    save_total_limit=2,
    logging_steps=3,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    disable_dropout=False,
    mask_learning_rate=1e-2,
    resume_from_checkpoint="auto",
    eval_steps=4,
)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_head_resumes_to_the_same_bits(tmp_path, tied):
    model = save_model(tmp_path / "model", attention_dropout=0.2, tie_word_embeddings=tied)
    data = write_data(tmp_path / "pairs.jsonl", rows=11)
    options = dict(
        lora_r=4, lora_target_modules=("q_proj", "lm_head"), lora_dropout=0.1, max_steps=4,
        save_steps=2, disable_dropout=False, loss=("tdpo2",), eval_dataset=data,
    )  # fmt: skip
    train(config(tmp_path / "whole", model, data, **options))
    start = str(tmp_path / "whole" / "checkpoint-2")
    train(config(tmp_path / "resumed", model, data, resume_from_checkpoint=start, **options))
    whole, resumed = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "resumed")
    )
    assert whole == resumed


def materials(tmp_path) -> tuple[str, str]:
    # dropout on: the generators' state must be restored too
    model = save_model(tmp_path / "model", attention_dropout=0.2)
    return model, write_data(tmp_path / "pairs.jsonl", rows=11)


def logged(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log_history.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in VOLATILE and not k.startswith("train_")}
        for row in rows
    ]


def assert_same_run(a: Path, b: Path) -> None:
    names = [p.name for p in a.iterdir() if p.suffix == ".safetensors"]
    assert names
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), f"{name} differs"
    assert logged(a) == logged(b)
    assert not list(b.glob(".prefkern-*"))


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing in the package may catch it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of an uninterrupted run, model, data)."""
    folder = tmp_path_factory.mktemp("whole")
    model, data = materials(folder)
    train(config(folder / "run", model, data, **COMMON))
    return folder / "run", model, data


@pytest.mark.parametrize("number", range(1, 15))
def test_stopped_at_any_micro_batch(whole, tmp_path, monkeypatch, number):
    expected, model, data = whole
    calls, original = [0], Run.micro_batch

    def micro_batch(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(Run, "micro_batch", micro_batch)
    with pytest.raises(Killed):
        train(config(tmp_path / "broken", model, data, **COMMON))
    monkeypatch.undo()
    train(config(tmp_path / "broken", model, data, **COMMON))
    assert_same_run(expected, tmp_path / "broken")


def run_process(point: str, settings: Path) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    script = [sys.executable, str(HERE / "kill_and_resume.py"), point, str(settings)]
    return subprocess.run(script, env=environment, capture_output=True, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"loss": ("dpo",), "loss_args": {}, "lora_r": 4}], ids=["full", "lora"]
)
def test_sigkill_at_every_kind_of_moment(tmp_path, options):
    """One run killed again and again, each time at another kind of moment, against a whole one."""
    model, data = materials(tmp_path)
    files = {}
    for name in ("whole", "killed"):
        made = config(tmp_path / name, model, data, **COMMON | {"max_steps": 16} | options)
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(made.as_dict()))
    assert run_process("none", files["whole"]) == 0
    points = [
        "mid-accumulation",
        "mid-log",
        "mid-save",
        "before-rename",
        "after-rename",
        "mid-prune",
        "after-step",
        "final-save",
    ]
    if "lora_r" in options:
        points = ["mid-save", "final-save"]
    for point in points:
        assert run_process(point, files["killed"]) == -signal.SIGKILL, point
    assert run_process("none", files["killed"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_half_written_checkpoints_are_never_read(tmp_path):
    model, data = materials(tmp_path)
    out = tmp_path / "out"
    train(config(out, model, data, **COMMON | {"max_steps": 4}))
    assert seals.find_resume("auto", out)[0].name == "checkpoint-4"
    (out / "tmp-checkpoint-6").mkdir()
    assert seals.find_resume("auto", out)[0].name == "checkpoint-4"
    assert seals.find_resume("auto", tmp_path / "empty") == (None, [])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    model, data = materials(tmp_path)
    out = tmp_path / "out"
    train(config(out, model, data, **COMMON | {"max_steps": 4}))
    with pytest.raises(
        ValueError, match=r"other options.*learning_rate: was 0\.001, is 0\.1.*max_steps: was 4"
    ):
        train(config(out, model, data, **COMMON | {"learning_rate": 0.1}))
    write_data(tmp_path / "pairs.jsonl", rows=11, seed=9)
    with pytest.raises(ValueError, match="other data"):
        train(config(out, model, data, **COMMON | {"max_steps": 4}))


def test_a_finished_run_stays_finished(tmp_path):
    model, data = materials(tmp_path)
    settings = config(tmp_path / "out", model, data, **COMMON | {"max_steps": 4})
    train(settings)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    run = prepare(settings)
    assert run.resume.name == "checkpoint-4"
    train_run(run)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
