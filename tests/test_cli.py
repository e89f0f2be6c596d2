"""The command line: verbs, YAML plus flags, one-line errors with exit status 2."""

from __future__ import annotations

import json

import pytest
from tiny_models import save_model, write_data

from prefkern import cli
from prefkern.losses import LOSSES


@pytest.fixture
def run(capsys):
    def call(*args: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(a) for a in args])
        except SystemExit as stop:  # argparse and tyro
            status = int(stop.code or 0)
        found = capsys.readouterr()
        return status, found.out, found.err

    return call


@pytest.fixture
def materials(tmp_path):
    return save_model(tmp_path / "model"), write_data(tmp_path / "pairs.jsonl")


QUIET = ("--device", "cpu", "--max-length", 64, "--disable-tqdm", "--no-plots", "--save-steps", 0)


def flags(materials, out, *more):
    return ("--model", materials[0], "--dataset", materials[1], "--output-dir", out, *QUIET, *more)


def test_overview_and_unknown_verbs(run):
    status, out, _ = run("--help")
    assert status == 0 and all(verb in out for verb in cli.VERBS)
    status, _, err = run("trian")
    assert status == 2 and "unknown verb 'trian'; nearest: train" in err
    assert run("--version")[1].startswith("prefkern ")
    assert run()[0] == 2


def test_losses_table_names_every_loss(run):
    status, out, _ = run("losses")
    assert status == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(LOSSES) <= set(rows)
    assert "logp, fkl" in rows["tdpo2"] and "pairwise" in rows["tdpo2"]
    found = json.loads(run("losses", "--json")[1])
    assert {row["loss"] for row in found["losses"]} == set(LOSSES)
    status, out, _ = run("losses", "tdpo2")
    assert status == 0 and "alpha     0.5" in out
    status, _, err = run("losses", "tdop2")
    assert status == 2 and "nearest: tdpo2" in err and "Traceback" not in err


def test_train_eval_plot(run, materials, tmp_path):
    out = tmp_path / "out"
    status, text, err = run(
        "train",
        *flags(
            materials,
            out,
            "--loss",
            "tdpo2",
            "--loss-arg",
            "alpha=0.3",
            "--max-steps",
            2,
            "--logging-steps",
            1,
            "--learning-rate",
            "1e-3",
        ),
    )
    assert status == 0, err
    assert json.loads(text.splitlines()[-1])["step"] == 2
    saved = [json.loads(line) for line in (out / "log_history.jsonl").read_text().splitlines()]
    assert saved[0]["step"] == 1
    status, text, err = run(
        "eval",
        "--model",
        out,
        "--ref-model",
        materials[0],
        "--dataset",
        materials[1],
        *QUIET,
        "--loss",
        "tdpo2",
        "--json",
    )
    assert status == 0, err
    assert {"eval_rewards/accuracies", "eval_length_baseline", "eval_kl/chosen"} <= json.loads(
        text
    ).keys()
    status, _, err = run("eval", "--model", out, "--dataset", materials[1], *QUIET)
    assert status == 2 and "--ref-model" in err
    status, text, _ = run("plot", out)
    assert status == 0 and (out / "loss.png").is_file()


def test_yaml_with_flag_overrides_and_dry_run(run, materials, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {materials[0]}\ndataset: {materials[1]}\nloss: tdpo2\n"
        "loss_args: {alpha: 0.3, beta: 0.2}\n"
        "learning_rate: 1e-4\nmax_length: 64\ndevice: cpu\ndisable_tqdm: true\npacking: off\n"
    )
    status, out, err = run(
        "train",
        file,
        "--dry-run",
        "--learning-rate",
        "1e-3",
        "--loss-arg",
        "alpha=0.7",
        "--output-dir",
        tmp_path / "o",
    )
    assert status == 0, err
    found = json.loads(out)
    assert found["config"]["learning_rate"] == 1e-3 and found["config"]["packing"] == "off"
    assert found["config"]["loss_args"] == {"alpha": 0.7, "beta": 0.2}
    assert (
        found["data"]["groups"] == 12
        and found["head"]["hidden"] == 32
        and found["batches"] == "padded"
    )
    assert not (tmp_path / "o").exists()
    file.write_text(file.read_text() + "leraning_rate: 1\n")
    status, _, err = run("train", "--config", file)
    assert status == 2 and "unknown key 'leraning_rate'; nearest: learning_rate" in err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--loss", "tdpo"), "unknown loss 'tdpo'; nearest:"),
        (("--loss-arg", "bta=1"), "no argument 'bta'; nearest: beta"),
        (("--loss-arg", "beta"), "name=value"),
        (("--leraning-rate", "1"), "unknown option --leraning-rate; nearest: learning-rate"),
        (("--model", "/no/such/model"), "/no/such/model"),
        (("--dataset", "/no/such/file.jsonl"), "/no/such/file.jsonl"),
        (("--max-length", "9999"), "context of 128"),
        (("--config", "/no/such.yaml"), "/no/such.yaml"),
    ],
)
def test_mistakes_are_one_line(run, materials, tmp_path, more, text):
    status, _, err = run("train", *flags(materials, tmp_path / "o", *more))
    assert status == 2 and "Traceback" not in err
    assert text in err
    assert (
        len([line for line in err.splitlines() if line.startswith("prefkern train: error:")]) == 1
    )


def test_options_that_contradict_each_other(run, materials, tmp_path):
    status, _, err = run("train", *flags(materials, tmp_path / "o", "--loss-weights", "1", "2"))
    assert status == 2 and "one number per loss" in err and "Traceback" not in err


def test_debug_shows_the_traceback(materials, tmp_path):
    with pytest.raises(ValueError, match="unknown loss"):
        cli.main(
            ["train", *map(str, flags(materials, tmp_path / "o", "--loss", "tdpo")), "--debug"]
        )


def test_a_missing_package_names_the_extra(run, materials, tmp_path, monkeypatch):
    import prefkern.train as package

    monkeypatch.setattr(package, "find_spec", lambda name: None if name == "tyro" else object())
    status, _, err = run("train", *flags(materials, tmp_path / "o"))
    assert status == 2 and "pip install 'prefkern[train]'" in err and "tyro" in err


def test_precompute_writes_a_cache_that_train_reads(run, materials, tmp_path):
    status, out, err = run("precompute", *flags(materials, tmp_path / "cache"))
    assert status == 0, err
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    assert out.splitlines()[-1] == str(file)
    more = ("--precomputed-ref", file, "--max-steps", 1)
    status, _, err = run("train", *flags(materials, tmp_path / "out", *more))
    assert status == 0, err


def test_env_json(run):
    status, out, _ = run("env", "--json")
    assert status == 0 and "backends" in json.loads(out)


def test_bench_passes_its_arguments_on(run, monkeypatch):
    calls = []
    monkeypatch.setattr(
        cli.subprocess, "call", lambda command, cwd: calls.append((command, cwd)) or 3
    )
    assert run("bench", "--quick", "--cases", "dpo")[0] == 3
    assert (
        calls[0][0][-3:] == ["--quick", "--cases", "dpo"] and (calls[0][1] / "benchmarks").is_dir()
    )


def test_help_of_every_verb(run):
    for verb in cli.VERBS:
        if verb != "bench":
            status, out, _ = run(verb, "--help")
            assert status == 0 and verb in out
