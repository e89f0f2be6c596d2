"""FSDP2 and tensor parallelism on two gloo ranks: the losses, gradient norms and weights of one
process; checkpoints in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from many_processes import CASES, COMMON, assert_equal, launched_as_one, rows_of
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data

from prefkern.train import seals, train

LAUNCH = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: true
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: false
"""
WORKER = str(Path(__file__).with_name("sharded_ranks.py"))
LONG = 400  # seconds, on a machine that much else runs on


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name in one process and in two that share the model, and what they were made of."""
    folder = tmp_path_factory.mktemp("sharded")
    model, data = save_model(folder / "model"), write_data(folder / "pairs.jsonl", rows=13)
    tied = save_model(folder / "tied", tie_word_embeddings=True)

    def made(name: str, where: str, accumulate: int, **more):
        own = more.pop("model", tied if name == "tdpo2" else model)
        options = COMMON | CASES[name] | {"gradient_accumulation_steps": accumulate} | more
        return config(folder / where / name, own, data, eval_dataset=data, **options)

    for name in CASES:
        train(made(name, "one", 4))
        settings = folder / f"{name}.json"
        settings.write_text(json.dumps(made(name, "two", 2).as_dict()))
    # the second half again, from the checkpoint in its middle
    again = made("masks", "again", 2, resume_from_checkpoint=str(folder / "two/masks/checkpoint-2"))
    (folder / "again.json").write_text(json.dumps(again.as_dict()))
    # and from one that one process wrote
    other = made("lora", "other", 2, resume_from_checkpoint=str(folder / "one/lora/checkpoint-2"))
    (folder / "other.json").write_text(json.dumps(other.as_dict()))
    run_ranks(
        folder / "ranks",
        WORKER,
        "runs",
        2,
        "fsdp",
        str(folder),
        *CASES,
        "again",
        "other",
        seconds=LONG,
    )
    return folder, made


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_of_fsdp_are_one_process(runs, name):
    folder, _ = runs
    assert_equal(folder / "one" / name, folder / "two" / name)
    start = load_file(folder / ("tied" if name == "tdpo2" else "model") / "model.safetensors")
    if name != "lora":
        ended = load_file(folder / "two" / name / "model.safetensors")
        assert any((ended[k] - v).abs().max() > 1e-4 for k, v in start.items()), "nothing moved"


def test_a_checkpoint_in_parts_is_whole_and_continues_to_the_same_bits(runs):
    folder, _ = runs
    checkpoint = folder / "two/masks/checkpoint-2"
    parts = sorted(path.name for path in (checkpoint / "sharded").iterdir())
    assert len(parts) == 2 and all(name.endswith(".safetensors") for name in parts)
    assert seals.damage(checkpoint) is None
    assert not list((folder / "two/masks").glob(".prefkern-*"))
    for name in ("model.safetensors", "masks.safetensors"):
        again, before = (folder / d / "masks" / name for d in ("again", "two"))
        assert again.read_bytes() == before.read_bytes(), name
    logs = (rows_of(folder / where / "masks") for where in ("again", "two"))
    again, before = ([row["loss"] for row in rows if "loss" in row] for rows in logs)
    assert len(again) == 4 and again == before


@pytest.mark.parametrize("name", ["masks", "moves", "lora"])
def test_one_process_continues_what_two_began(runs, name):
    folder, made = runs
    start = str(folder / "two" / name / "checkpoint-2")
    train(made(name, "alone", 4, resume_from_checkpoint=start))
    assert_equal(folder / "one" / name, folder / "alone" / name)


def test_two_continue_what_one_process_began(runs):
    folder, _ = runs
    assert_equal(folder / "one/lora", folder / "other/lora")


def test_another_number_of_processes_needs_as_many_micro_batches(runs):
    folder, made = runs
    start = str(folder / "two/dpo/checkpoint-2")
    with pytest.raises(ValueError, match=r"2 processes with 2 .* pass gradient_acc\w+=4"):
        train(made("dpo", "refused", 2, resume_from_checkpoint=start))


def test_a_checkpoint_in_parts_is_no_model(runs):
    folder, made = runs
    with pytest.raises(ValueError, match=r"checkpoint in parts.*--resume-from-checkpoint"):
        train(made("dpo", "refused", 4, model=str(folder / "two/dpo/checkpoint-4")))


def test_a_damaged_part_is_seen(runs, tmp_path):
    folder, made = runs
    start = folder / "two/dpo/checkpoint-4"
    part = next((start / "sharded").iterdir())
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match="is damaged: the bytes of sharded/shard-"):
            train(made("dpo", "refused", 4, resume_from_checkpoint=str(start)))
    finally:
        part.write_bytes(whole)


@pytest.mark.slow
def test_a_rank_that_is_killed_leaves_what_can_be_continued(runs):
    """In a step, then in a save, each time one rank; the third start ends where an undisturbed run
    does, to the bit."""
    folder, made = runs
    settings = made("masks", "killed", 2, resume_from_checkpoint="auto").as_dict()
    (folder / "killed.json").write_text(json.dumps(settings))
    for number, point in enumerate(("step", "save", "rename")):
        with pytest.raises(AssertionError, match="rank 0"):
            place = folder / f"ranks-{number}"
            run_ranks(place, WORKER, "killed", 2, str(folder), "killed", point, seconds=LONG)
    whole = [path.name for path in (folder / "killed/masks").glob("checkpoint-*")]
    assert whole == ["checkpoint-2"] and seals.damage(folder / "killed/masks/checkpoint-2") is None
    run_ranks(folder / "ranks-9", WORKER, "runs", 2, "fsdp", str(folder), "killed", seconds=LONG)
    for name in ("model.safetensors", "masks.safetensors"):
        again, before = (folder / d / "masks" / name for d in ("killed", "two"))
        assert again.read_bytes() == before.read_bytes(), name
    assert not list((folder / "killed/masks").glob(".prefkern-*"))


def test_two_ranks_of_tensor_parallelism_are_one_process(tmp_path):
    """A vocabulary of 261 entries: the second rank has one fewer."""
    model = save_model(tmp_path / "model", vocab_size=261)
    data = write_data(tmp_path / "pairs.jsonl", rows=13)

    def made(where: str, **more):
        options = COMMON | CASES["masks"] | {"gradient_accumulation_steps": 4} | more
        return config(tmp_path / where, model, data, eval_dataset=data, **options)

    train(made("one"))
    start = str(tmp_path / "two/checkpoint-2")
    for name, more in (("two", {}), ("again", {"resume_from_checkpoint": start})):
        (tmp_path / f"{name}.json").write_text(json.dumps(made(name, **more).as_dict()))
    run_ranks(
        tmp_path / "ranks", WORKER, "runs", 2, "tensor", str(tmp_path), "two", "again", seconds=LONG
    )
    assert_equal(tmp_path / "one", tmp_path / "two")
    again, before = (tmp_path / d / "model.safetensors" for d in ("again", "two"))
    assert again.read_bytes() == before.read_bytes()
    assert "distributed_config" not in json.loads((tmp_path / "two/config.json").read_text())


def test_an_error_in_one_rank_is_every_ranks(tmp_path):
    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "pairs.jsonl", rows=13)
    options = COMMON | CASES["tdpo2"] | {"overwrite_output_dir": True}
    settings = config(tmp_path / "out", model, data, **options)
    (tmp_path / "run.json").write_text(json.dumps(settings.as_dict()))
    found = run_ranks(
        tmp_path / "ranks", WORKER, "fails", 2, str(tmp_path), "run", "ends", seconds=LONG
    )
    assert "ValueError: out of paper" in found[1]
    assert "ValueError: process 1 failed: out of paper" in found[0]
    # and where the one that failed neither ends nor lets go of the others
    more = (str(tmp_path), "run", "stays")
    with pytest.raises(AssertionError, match=r"--- rank 0\n(.*\n)*process 1 failed: out of paper"):
        run_ranks(tmp_path / "more", WORKER, "fails", 2, *more, seconds=LONG)


@pytest.mark.slow
def test_accelerate_launch_with_its_own_file(tmp_path):
    """The weights are read by one process and handed round."""
    launched_as_one(tmp_path, LAUNCH, "masks")
