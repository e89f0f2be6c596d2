"""One line and status 2 for every mistake on a command line, before the work that it wastes."""

from __future__ import annotations

import json

import datasets
import pytest
from safetensors.torch import load_file, save_file
from tiny_models import save_model, write_data

from prefkern.cli.main import main
from prefkern.train.plots import plot_history


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("materials")
    return save_model(folder / "model"), write_data(folder / "pairs.jsonl")


def told(capsys, *args: object) -> str:
    """The one line of a mistake."""
    status = main([str(a) for a in args])
    lines = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert status == 2 and len(lines) == 1, lines
    return lines[0]


def options(materials, folder, *more: object) -> list[object]:
    return [
        "train", "--model", materials[0], "--dataset", materials[1], "--output-dir", folder,
        "--device", "cpu", "--disable-tqdm", "--max-length", 64, "--max-steps", 1, "--no-plots",
        *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--loss-arg", "beta="], "beta must be a number or a tensor, got None"),
        (["--loss-arg", "beta=abc"], "beta must be a number or a tensor, got the string 'abc'"),
        (["--loss-arg", "beta=[0.1]"], "beta must be a number or a tensor, got list"),
        (["--loss-arg", "beta=true"], "beta must be a number or a tensor, got True"),
        (["--loss-arg", "beta=[1"], "'[1' is no value"),
        (["--loss-arg", "beta=.inf"], "loss_args must be finite, got inf"),
        (["--num-train-epochs", "inf"], "num_train_epochs must be finite"),
        (["--learning-rate", "nan"], "learning_rate must be finite"),
        (["--learning-rate", "0"], "the learning rate is 0 in every step (learning_rate 0,"),
        (["--warmup-steps", "1"], "1 steps of warm-up of 1), so nothing would be trained"),
        (["--learning-rate", "1e38"], "step 1 cannot be taken at a learning rate of 1e+38"),
        (["--adam-beta1", "1.0"], "adam_beta1 must be in [0, 1)"),
        (["--weight-decay", "-1"], "weight_decay must be >= 0"),
        (["--seed", "-1"], "seed must be >= 0"),
        (["--tail-mass", "2"], "tail_mass must be in [0, 1], got 2.0"),
        (["--lora-r", "2", "--lora-dropout", "1.5"], "lora_dropout must be in [0, 1), got 1.5"),
        (["--lr-scheduler-type", "quadratic"], "lr_scheduler_type quadratic"),
        (["--lr-scheduler-type", "warmup_stable_decay"], "lr_scheduler_type warmup_stable_decay"),
        (["--lr-scheduler-type", "reduce_lr_on_plateau"], "follows a metric"),
        (["--lr-scheduler-type", "cosine_with_min_lr"], "for which there is no option here"),
        (["--output-dir", ""], "output_dir must name a folder, got an empty text"),
        (["--dataset", ""], "dataset: there is no file ''"),
        (["--precomputed-ref", ""], "precomputed_ref: there is no ''"),
        (["--report-to", "none"], "leave report_to out for none"),
        (["--lora-r", "2", "--lora-target-modules", "q"], "lora_target_modules: Target modules"),
        (["--seed", "4294967296"], "seed must be below 2**32, got 4294967296"),
        (["--loss", "ndcg"], "unknown loss 'ndcg'; nearest: approx_ndcg, neural_ndcg"),
        (["--loss", "qqqq"], "unknown loss 'qqqq'; `prefkern losses` lists them"),
        (["--ref-model", "/no/folder"], "ref_model: there is no model folder '/no/folder'"),
        (["--model", "/no/folder"], "model: there is no model folder '/no/folder'"),
        (["--dataset", "none.jsonl"], "dataset: there is no file 'none.jsonl'"),
        (["--eval-dataset", "/none"], "eval_dataset: there is no file '/none'"),
        (["--precomputed-ref", "none"], "precomputed_ref: there is no 'none'"),
        (["--attn-implementation", "flash_attention_9"], "cannot be loaded"),
        (["--column", "promt=x"], "reads no column for 'promt'; nearest: prompt"),
        (["--column", "prompt=qestion"], "has no column 'qestion', from which prompt is to be"),
        (["--resume-from-checkpoint", "/none/checkpoint-3"], "is not a checkpoint"),
    ],
    ids=lambda given: "" if isinstance(given, str) else " ".join(given),
)
def test_options(capsys, tmp_path, materials, given, words):
    assert words in told(capsys, *options(materials, tmp_path / "out", *given))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rate: abc", "learning_rate must be a number, got 'abc'"),
        ("learning_rate: [1]", "learning_rate must be float"),
        ("max_steps: 1.5", "max_steps must be int, got 1.5"),
        ("loss_args: 3", "loss_args must be dict"),
        ("loss_args: {beta: 1e400}", "loss_args must be finite, got inf"),
        ("a: b: c", "not a readable YAML file"),
        ("seed: 1\nseed: 2", "not a readable YAML file: seed is given twice"),
        ("loss_args: {beta: 1, beta: 2}", "not a readable YAML file: beta is given twice"),
    ],
)
def test_yaml(capsys, tmp_path, materials, line, words):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {materials[0]}\ndataset: {materials[1]}\n{line}\n")
    assert words in told(capsys, "train", path)


@pytest.mark.parametrize(
    ("verb", "flag", "of"),
    [
        ("precompute", ["--dry-run"], "train"), ("eval", ["--dry-run"], "train"),
        ("train", ["--json"], "eval"), ("train", ["--row", "3"], "view"),
    ],
)  # fmt: skip
def test_flags_of_other_verbs(capsys, tmp_path, materials, verb, flag, of):
    given = [verb, *options(materials, tmp_path / "out")[1:], *flag]
    assert f"{flag[0]} is an option of prefkern {of} alone" in told(capsys, *given)
    assert not (tmp_path / "out").exists()


def test_what_stands_in_the_place_of_a_yaml_file(capsys, tmp_path, materials):
    for verb in ("train", "eval", "precompute", "score", "sample"):
        line = told(capsys, verb, materials[0])
        assert "is neither an option nor a .yaml file" in line
    assert "there is no file 'none.yaml'" in told(capsys, "train", "none.yaml")


def test_files_that_hold_no_row_to_read(capsys, tmp_path, materials):
    for name, data, words in (
        ("u.jsonl", "{}".encode("utf-16"), "none of 1 rows can be read: u.jsonl:1: byte 1"),
        ("p.json", b'{\n "prompt": 1\n}\n', "whole object on every line"),
        ("e.jsonl", b"\n", "e.jsonl holds no rows"),
    ):
        (tmp_path / name).write_bytes(data)
        assert words in told(
            capsys, *options(materials, tmp_path / "o", "--dataset", tmp_path / name)
        )
    (tmp_path / "log_history.jsonl").write_text('{"step": 1, "loss": "abc"}\nxx\n')
    assert "nothing to draw: " in told(capsys, "plot", tmp_path)
    folder = tmp_path / "of datasets"
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    datasets.DatasetDict(train=rows).save_to_disk(str(folder))
    line = told(capsys, *options(materials, tmp_path / "o", "--eval-dataset", folder))
    assert "eval_dataset: there is no split 'test'" in line and "--eval-split" in line


def test_merge(capsys, tmp_path, materials):
    folders = []
    for seed in (1, 2):
        folder = tmp_path / f"a{seed}"
        more = ["--lora-r", 2, "--seed", seed, "--learning-rate", 1e-2]
        assert main([str(x) for x in options(materials, folder, *more)]) == 0
        folders.append(folder)
    capsys.readouterr()
    for number in ("nan", "inf"):
        line = told(
            capsys, "merge", *folders, "--output-dir", tmp_path / "m", "--weights", number, 1
        )
        assert "weights must be finite" in line
    line = told(capsys, "merge", *folders, "--output-dir", tmp_path / "m", "--weights", 0, 0)
    assert "not all of them 0" in line
    before = (folders[0] / "adapter_model.safetensors").read_bytes()
    for target, words in (
        (folders[0], "is, or lies in, the input"),
        (folders[1] / "in", "is, or lies in, the input"),
        (tmp_path, "is not empty"),
    ):
        assert words in told(capsys, "merge", *folders, "--output-dir", target)
    assert (folders[0] / "adapter_model.safetensors").read_bytes() == before
    assert main(["merge", *map(str, folders), "--output-dir", str(tmp_path / "m")]) == 0
    assert (tmp_path / "m" / "adapter_model.safetensors").is_file()
    line = told(capsys, "merge", *folders, "--output-dir", tmp_path / "n", "--weights", "1e300", 1)
    assert "the sum with weights [1e+300, 1.0] is not finite" in line
    weights = load_file(folders[1] / "adapter_model.safetensors")
    broken = {name: weight * float("nan") for name, weight in weights.items()}
    save_file(broken, folders[1] / "adapter_model.safetensors")
    line = told(capsys, "merge", *folders, "--output-dir", tmp_path / "n")
    assert f"the adapter of {folders[1]} is not finite" in line
    (folders[1] / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    assert "a2" in told(capsys, "merge", *folders, "--output-dir", tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_precompute_is_told_before_it_computes(capsys, tmp_path, materials):
    (tmp_path / "taken").write_text("x")
    line = told(
        capsys, "precompute", "--model", materials[0], "--dataset", materials[1], "--output-dir",
        tmp_path / "taken", "--device", "cpu",
    )  # fmt: skip
    assert "is not a folder" in line and "rows kept" not in capsys.readouterr().out


def test_plot_of_odd_rows(tmp_path):
    rows = [
        {"loss": 1.0, "step": None}, {"loss": 0.9, "step": 2}, {"loss": 0.8, "step": "3"},
        {"loss": 0.7, "step": 10**400}, {"loss": 10**400, "step": 4}, {"loss": 0.5, "step": 5},
        {"loss": 1e308, "step": 6}, {"loss": -1e308, "step": 7},
    ]  # fmt: skip
    path = tmp_path / "log_history.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plotted = plot_history(path, tmp_path)
    assert [p.name for p in plotted.files] == ["loss.png"]
    assert "loss: 3 rows without a step are left out" in plotted.notes
    assert "loss: 3 of 5 values are not finite" in plotted.notes


def test_memory_and_interruption(capsys, monkeypatch):
    from prefkern.cli import main as module

    class OutOfMemoryError(RuntimeError):
        pass

    def raises(error):
        def verb(args):
            raise error

        return verb

    monkeypatch.setitem(module.VERBS, "env", (raises(OutOfMemoryError("3 GiB")), ""))
    assert "out of memory (3 GiB)" in told(capsys, "env")
    of_the_host = RuntimeError("DefaultCPUAllocator: can't allocate memory: 3 GiB")
    monkeypatch.setitem(module.VERBS, "env", (raises(of_the_host), ""))
    assert "out of memory (DefaultCPUAllocator" in told(capsys, "env")
    compiler = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    monkeypatch.setitem(module.VERBS, "env", (raises(compiler("CppCompileError: no g++\n..")), ""))
    assert "(CppCompileError: no g++); another --attn-implementation" in told(capsys, "env")
    monkeypatch.setitem(module.VERBS, "env", (raises(KeyboardInterrupt()), ""))
    assert main(["env"]) == 130 and capsys.readouterr().err == "prefkern env: interrupted\n"
    monkeypatch.setitem(module.VERBS, "env", (raises(RuntimeError("a fault of ours")), ""))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["env"])


def test_what_leads_nowhere_is_told_before_anything_is_loaded(
    capsys, tmp_path, materials, monkeypatch
):
    from prefkern.train import models

    def loaded(*args, **kwargs):
        raise AssertionError("a model or tokenizer was loaded")

    monkeypatch.setattr(models, "load_whole", loaded)
    monkeypatch.setattr(models, "load_tokenizer", loaded)
    for option in ("--eval-dataset", "--ref-model", "--precomputed-ref", "--dataset"):
        line = told(capsys, *options(materials, tmp_path / "out", option, "/none/at/all"))
        assert "/none/at/all" in line and option[2:].replace("-", "_") in line
    for argument, words in (
        ("beta=-1", "loss 'dpo': beta must be a finite number > 0, got -1"),
        ("label_smoothing=0.9", "label_smoothing must be in"),
    ):
        given = options(materials, tmp_path / "out", "--dataset", "/none", "--loss-arg", argument)
        assert words in told(capsys, *given)
