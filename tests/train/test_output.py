"""The output folder: nothing is removed or replaced that the run did not make."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data

from prefkern.train import checkpoint, run, seals, train
from prefkern.train.demo import DemoSettings, run_demo
from prefkern.train.inputs import check_inputs, new_folder
from prefkern.train.output import LOG, MARK, Output, list_checkpoints
from prefkern.train.plots import plot_history
from prefkern.train.run import prepare


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("materials")
    return save_model(folder / "model"), write_data(folder / "pairs.jsonl")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_the_user_keeps_in_the_folder_stays(tmp_path, materials):
    out = tmp_path / "out"
    for name in ("tmp-data", "tmp-checkpoint-2", ".prefkern-123-final", "checkpoint-x", "final"):
        (out / name).mkdir(parents=True)
        (out / name / "labels.csv").write_text(f"of {name}")
    (out / "elsewhere").symlink_to(tmp_path)
    (out / "notes.txt").write_text("mine")
    before = tree(out)
    train(config(out, *materials, max_steps=2, save_steps=1, save_total_limit=1))
    after = tree(out)
    assert before.items() <= after.items()
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-2"]
    assert not list(out.glob(f".prefkern-{json.loads((out / MARK).read_text())['run']}-*"))


def test_a_second_run_moves_the_first_aside_or_overwrites(tmp_path, materials, capfd):
    out = tmp_path / "out"
    options = dict(max_steps=1, plots=True)
    train(config(out, *materials, **options))
    first = tree(out)
    # it is finished, and there is nothing to continue from
    with pytest.raises(ValueError, match="holds results of an earlier run"):
        train(config(out, *materials, seed=1, resume_from_checkpoint="auto", **options))
    assert tree(out) == first
    run = json.loads(first.pop(MARK))["run"]
    capfd.readouterr()
    train(config(out, *materials, seed=1, **options))
    assert f"were moved to {out / f'earlier-{run}'}" in capfd.readouterr().err
    assert tree(out / f"earlier-{run}") == first and (out / "curves.png").is_file()
    (out / "tokenizer.model").write_text("mine")  # among the run's, and not the run's
    with pytest.raises(ValueError, match=r"files of those names \(tokenizer\.model\)"):
        train(config(out, *materials, **options))
    (out / "tokenizer.model").unlink()
    (out / "notes.txt").write_text("mine")
    (out / "round-0").mkdir()
    train(config(out, *materials, seed=1, overwrite_output_dir=True, **options))
    again = tree(out)
    assert again["model.safetensors"] != first["model.safetensors"]
    assert again["notes.txt"] == b"mine" and (out / "round-0").is_dir()
    assert tree(out / f"earlier-{run}") == first


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", LOG, "loss.png", "README.md"])
def test_files_of_those_names_are_a_reason_to_refuse(tmp_path, materials, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"files of those names.*{name}"):
        prepare(config(tmp_path, *materials))
    assert (tmp_path / name).read_text() == "mine"


def test_what_others_put_into_a_checkpoint_stays(tmp_path, materials, capfd):
    out = tmp_path / "out"
    train(config(out, *materials, max_steps=2, save_steps=1))
    for name in ("checkpoint-1", "checkpoint-2"):
        (out / name / "scores").mkdir()
        (out / name / "scores" / "mmlu.json").write_text(name)
    (out / "checkpoint-1" / "link").symlink_to(tmp_path)
    run = json.loads((out / MARK).read_text())["run"]
    held = Output(out, run)
    held.aside(out / "checkpoint-1")  # as a limit of checkpoints does
    held.close()
    kept = out / f"earlier-{run}"
    assert (kept / "checkpoint-1" / "link").is_symlink() and not (out / "checkpoint-1").exists()
    train(config(out, *materials, max_steps=1, overwrite_output_dir=True))
    assert not list_checkpoints(out) and "mmlu.json is no file of this" in capfd.readouterr().err
    found = {p.relative_to(kept).parts[0]: p.read_text() for p in kept.rglob("mmlu.json")}
    assert found == {name: name for name in ("checkpoint-1", "checkpoint-2")}
    assert {p.name for p in kept.rglob("*") if p.is_file()} == {"mmlu.json"}


def test_checkpoints_of_another_run_are_not_this_runs(tmp_path):
    output = Output(tmp_path)
    for number, mark in ((1, None), (2, "another"), (10, output.run), (9, output.run)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if mark is not None:
            (tmp_path / f"checkpoint-{number}" / MARK).write_text(json.dumps({"run": mark}))
    output.close()
    assert [p.name for p in output.checkpoints()] == ["checkpoint-9", "checkpoint-10"]


def test_a_checkpoint_of_another_program_is_not_removed(tmp_path, materials):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "optimizer.pt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="checkpoint"):
            train(config(tmp_path, *materials, max_steps=1, overwrite_output_dir=overwrite))
    assert (tmp_path / "checkpoint-7" / "optimizer.pt").read_text() == "mine"


def test_a_run_never_writes_into_what_it_reads(tmp_path, materials):
    model, data = materials
    bad = [
        dict(folder=model),
        dict(folder=Path(model) / "runs" / "1"),
        dict(folder=tmp_path, ref_model=str(tmp_path / "checkpoint-3")),
        dict(folder=tmp_path, aux_model=str(tmp_path / "round-0" / "extrapolated")),
        dict(folder=tmp_path / "a", ref_model=str(tmp_path / "a")),
        dict(folder=tmp_path / "a" / "b", dataset=str(tmp_path / "a")),
        dict(folder=tmp_path / "a", precomputed_ref=str(tmp_path / "a"), loss=("dpo",)),
        dict(folder=tmp_path / "b", eval_dataset=str(tmp_path / "b" / LOG)),
    ]
    for name in ("a", "b", "checkpoint-3", "round-0/extrapolated"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b" / LOG).write_text("{}")
    adapter = tmp_path / "adapter"  # of which the run reads the base too
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": model}))
    bad += [dict(folder=model, model=str(adapter)), dict(folder=f"{model}/a", model=str(adapter))]
    bad += [dict(folder=model, model="of the hub", ref_model=str(adapter))]
    for options in bad:
        given = dict(model=model, dataset=data) | options
        with pytest.raises(ValueError, match="overlap, and a run never writes into what it reads"):
            check_inputs(
                config(given.pop("folder"), given.pop("model"), given.pop("dataset"), **given)
            )
    rows = shutil.copy(data, tmp_path / "b" / "pairs.jsonl")  # data beside the results are fine
    check_inputs(config(tmp_path / "b", model, str(rows)))
    check_inputs(config(Path(model).parent, model, data))
    check_inputs(config(tmp_path / "new", str(adapter), data))
    with pytest.raises(ValueError, match=r"lies in, the input .*adapter \(its base .*\)"):
        new_folder(Path(model) / "merged", [adapter])


def test_two_runs_cannot_share_a_folder_at_once(tmp_path, materials):
    out = tmp_path / "out"
    holder = Output(out)
    try:
        with pytest.raises(ValueError, match="another run is writing to"):
            prepare(config(out, *materials))
        with pytest.raises(ValueError, match="another run is writing to"):
            Output(out)
    finally:
        holder.close()
    prepare(config(out, *materials))


def test_another_run_is_not_continued_into_the_folder(tmp_path, materials):
    options = dict(max_steps=2, save_steps=1)
    train(config(tmp_path / "one", *materials, **options))
    train(config(tmp_path / "two", *materials, **options))
    start = str(tmp_path / "one" / "checkpoint-1")
    with pytest.raises(ValueError, match="holds files of another run than"):
        prepare(config(tmp_path / "two", *materials, resume_from_checkpoint=start, **options))
    train(config(tmp_path / "new", *materials, resume_from_checkpoint=start, **options))
    one, new = tree(tmp_path / "one"), tree(tmp_path / "new")
    assert one["model.safetensors"] == new["model.safetensors"]


def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path, materials, monkeypatch):
    out, original, calls = tmp_path / "out", checkpoint.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written: No space.*checkpoint-1"):
        train(config(out, *materials, max_steps=3, save_steps=1, save_total_limit=1))
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-1"]
    assert seals.damage(out / "checkpoint-1") is None
    assert not list(out.glob(".prefkern-*")) and not (out / "model.safetensors").exists()
    monkeypatch.undo()
    common = dict(max_steps=3, save_steps=1, save_total_limit=1, resume_from_checkpoint="auto")
    train(config(out, *materials, **common))
    train(config(tmp_path / "whole", *materials, **common))
    left, right = (load_file(f / "model.safetensors") for f in (out, tmp_path / "whole"))
    assert all(torch.equal(left[k], right[k]) for k in right)


def test_a_name_taken_while_the_run_went_on_costs_no_model(tmp_path):
    output = Output(tmp_path)
    building = output.partial("final")
    (building / "config.json").write_text("{}")
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="the result is whole in"):
        output.install(building)
    output.close()
    assert (tmp_path / "config.json").read_text() == "mine"
    assert (tmp_path / f"model-{output.run}" / "config.json").read_text() == "{}"


def test_the_folder_is_no_model_before_the_last_file(tmp_path, monkeypatch):
    output, moved = Output(tmp_path), []
    building = output.partial("final")
    for name in ("adapter_config.json", "config.json", "model.safetensors", "tokenizer.json"):
        (building / name).write_text(name)
    replace = checkpoint.os.replace
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b))
    )
    output.install(building)
    output.close()
    assert moved[-2:] == ["config.json", "adapter_config.json"]


def test_places_that_cannot_be_written_are_told_before_loading(tmp_path, materials, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run, "open_policy", loaded)
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is not a folder"):
            run.prepare(config(folder, *materials))
    with pytest.raises(ValueError, match="is not empty"):
        new_folder(tmp_path)
    with pytest.raises(ValueError, match="is, or lies in, the input"):
        new_folder(tmp_path / "a" / "b", [tmp_path / "a"])


def test_pictures_and_the_demonstration_keep_to_their_own(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"a photograph")
    with pytest.raises(ValueError, match="is no picture of prefkern plot"):
        plot_history([{"step": 1, "loss": 2.0}], tmp_path)
    first = plot_history([{"step": 1, "loss": 2.0}], tmp_path / "own").files
    assert plot_history([{"step": 1, "loss": 3.0}], tmp_path / "own").files == first
    with pytest.raises(ValueError, match="holds files that no demonstration wrote"):
        run_demo(tmp_path, DemoSettings())
    assert (tmp_path / "loss.png").read_bytes() == b"a photograph"
