"""Damaged checkpoints and files: passed over and said, or refused in a line that names the file."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data
from tiny_tokenizer import byte_tokenizer

from prefkern.train import models, seals, train
from prefkern.train.data import load_examples
from prefkern.train.seals import damage, find_resume

QUICK = settings(
    max_examples=60, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run of 3 steps with a checkpoint each, model, data)."""
    folder = tmp_path_factory.mktemp("run")
    model, data = save_model(folder / "model"), write_data(folder / "pairs.jsonl")
    train(config(folder / "out", model, data, save_steps=1))
    return folder / "out", model, data


def spoil(path, place: float, bit: int, cut: bool) -> bool:
    """Cuts a file at, or flips a bit of, the byte at that share of its length."""
    content = bytearray(path.read_bytes())
    at = min(int(place * len(content)), len(content) - 1)
    if cut:
        path.write_bytes(content[:at])
    else:
        content[at] ^= 1 << bit
        path.write_bytes(content)
    return True


@QUICK
@given(st.data(), st.floats(0, 1), st.integers(0, 7), st.booleans())
def test_any_damage_to_a_checkpoint_is_seen(run, tmp_path_factory, data, place, bit, cut):
    out = tmp_path_factory.mktemp("copy") / "out"
    shutil.copytree(run[0], out)
    newest = out / "checkpoint-3"
    name = data.draw(st.sampled_from(sorted(p.name for p in newest.iterdir())))
    spoil(newest / name, place, bit, cut)
    found, notes = find_resume("auto", out)
    assert found == out / "checkpoint-2"
    assert len(notes) == 1 and name in notes[0] and "checkpoint-3 is damaged" in notes[0]
    with pytest.raises(ValueError, match=r"is (damaged|not a checkpoint)") as told:
        find_resume(str(newest), out)
    assert name in str(told.value) or "prefkern_state.json" in str(told.value)
    shutil.rmtree(out.parent)


def test_the_run_goes_on_from_the_newest_whole_checkpoint(run, tmp_path, capfd):
    original, model, data = run
    out = tmp_path / "out"
    shutil.copytree(original, out)
    (out / "checkpoint-3" / "optimizer.safetensors").unlink()
    train(config(out, model, data, save_steps=1, resume_from_checkpoint="auto"))
    said = capfd.readouterr().err
    assert "checkpoint-3 is damaged (optimizer.safetensors is missing)" in said
    assert "at step 2 of 3" in said
    assert damage(out / "checkpoint-3") is None
    name = "model.safetensors"
    assert (out / name).read_bytes() == (original / name).read_bytes()
    for number in (1, 2, 3):
        (out / f"checkpoint-{number}" / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is whole: .*config\.json has 2 bytes"
    ):
        find_resume("auto", out)


def test_a_whole_checkpoint_that_does_not_fit_is_one_line(run, tmp_path):
    """Sealed by hand, so that only its content is wrong."""
    original, model, data = run
    out = tmp_path / "out"
    shutil.copytree(original, out)
    path = out / "checkpoint-3"
    (path / "scheduler.json").write_text("[]")
    (path / "prefkern_run.json").unlink()
    seals.seal(path, seals.read_mark(out)["run"])
    with pytest.raises(ValueError, match=r"checkpoint-3 cannot be read"):
        train(config(out, model, data, save_steps=1, resume_from_checkpoint="auto"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.98])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_model_is_one_line(run, tmp_path, name, share):
    shutil.copytree(run[1], tmp_path / "model")
    spoil(tmp_path / "model" / name, share, 0, True)
    with pytest.raises(ValueError, match="cannot be loaded") as told:
        models.load_tokenizer(str(tmp_path / "model"))
        models.load_causal_lm(str(tmp_path / "model"), config("o", "m", "d"))
    assert "\n" not in str(told.value)
    if name == "model.safetensors":
        assert name in str(told.value)


@QUICK
@given(st.floats(0, 1), st.integers(0, 7), st.booleans(), st.sampled_from([".jsonl", ".parquet"]))
def test_a_damaged_data_file_is_read_or_refused(tmp_path, place, bit, cut, suffix):
    path = tmp_path / f"rows{suffix}"
    rows = [{"prompt": f"q{i}", "chosen": "yes" * i + "a", "rejected": "no"} for i in range(20)]
    if suffix == ".jsonl":
        import json

        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    spoil(path, place, bit, cut)
    try:
        found = load_examples(str(path), tokenizer=byte_tokenizer())
    except ValueError:
        return
    assert 0 < found.report.kept <= 21


def test_a_damaged_cache_is_one_line(tmp_path):
    from prefkern.train import reference_cache

    examples = load_examples(
        [{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer=byte_tokenizer()
    ).examples
    (tmp_path / "ref_logps-1.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="not a whole file of `prefkern precompute`"):
        reference_cache.find(tmp_path, examples, same_tokens=True)


def test_files_of_the_whole_run_are_sealed(run):
    for path in run[0].glob("checkpoint-*"):
        assert damage(path) is None
        assert load_file(path / "model.safetensors")
