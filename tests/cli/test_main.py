"""The command line: verbs, YAML plus flags, one-line errors with exit status 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tiny_models import save_model, write_data

from prefkern.cli import main as cli
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
        (("--beta", "0.1"), "an argument of a loss is written --loss-arg beta=VALUE"),
        (("--model_name_or_path", "m"), "here it is --model."),
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


FAMILIES = [  # loss, layout, further flags
    ("simpo", "pairs", ()),
    ("soft_label", "pairs", ("--column", "pref_prob=confidence")),
    ("beta_dpo", "pairs", ("--loss-arg", "rho=0.5")),
    ("orpo", "pairs", ("--likelihood-prompt",)),
    ("tdpo2", "pairs", ("--score-prompt",)),
    ("bco", "unpaired", ()),
    ("lipo", "lists", ("--loss-arg", "beta=0.5")),
    ("grpo", "pairs", ("--column", "advantages=gain", "--loss-arg", "aggregation=dapo")),
]


def test_train_by_name_from_every_family(tmp_path):
    """In a process of its own, as a user starts it; one process for all, which costs its start."""
    model, files = save_model(tmp_path / "model"), {}
    for layout in ("pairs", "unpaired", "lists"):
        path = tmp_path / f"{layout}.jsonl"
        write_data(path, layout, rows=4)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        more = {"confidence": 0.7, "chosen_gain": 1.0, "rejected_gain": -0.5}
        path.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
        files[layout] = str(path)
    calls = [
        ["train", *map(str, flags((model, files[layout]), tmp_path / loss, "--max-steps", 1)),
         "--loss", loss, *more]
        for loss, layout, more in FAMILIES
    ]  # fmt: skip
    script = "import json, sys; from prefkern.cli.main import main\n"
    script += "for call in json.loads(sys.argv[1]): print('status', main(call))\n"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.count("status 0") == len(calls), done.stdout + done.stderr
    for loss, _, _ in FAMILIES:
        log = (tmp_path / loss / "log_history.jsonl").read_text().splitlines()
        assert json.loads(log[0])["step"] == 1


def test_losses_table_says_what_each_loss_needs(run):
    found = {row["loss"]: row for row in json.loads(run("losses", "--json")[1])["losses"]}
    for name, row in found.items():
        assert row["family"] and row["source"] and row["status"], name
        assert row["reference"] in ("yes", "no")
    assert found["soft_label"]["needs"] == "pref_prob" and found["simpo"]["reference"] == "no"
    assert "jsd" in found["gkd"]["statistics"]
    header = run("losses")[1].splitlines()[0].split()
    assert header == ["loss", "family", "reference", "statistics", "needs", "source", "status"]
