"""`prefkern score`: columns of every layout, formats, what is refused and what is kept."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from stored_commands import rows_of, told, write_lines
from tiny_models import config, save_model, tiny_model, write_data
from tiny_tokenizer import byte_tokenizer

from prefkern.cli.main import main
from prefkern.train.recipes.answer_logps import answer_logps
from prefkern.train.stored import work
from prefkern.train.stored.options import ScoreConfig
from prefkern.train.stored.score import score
from prefkern.train.stored.work import Work

JUDGE = """
import math, pathlib

def length(row, answers):
    return [float(len(text)) for text in answers]

def two(row, answers):
    return [[1.0, float(len(text))] for text in answers]

def nan(row, answers):
    return [math.nan if row["prompt"].startswith("7:") else 1.0 for _ in answers]

def short(row, answers):
    return [1.0]

def ragged(row, answers):
    return [[1.0] * len(text) for text in answers]

def broken(row, answers):
    return row["no such column"]

def once(row, answers):
    flag = pathlib.Path(__file__).with_name("flag")
    if row["prompt"].startswith("9:") and not flag.exists():
        flag.touch()
        raise RuntimeError("the service is away")
    with open(pathlib.Path(__file__).with_name("asked"), "a") as file:
        file.write(row["prompt"] + "\\n")
    return length(row, answers)
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with data of every layout, two models and judges."""
    folder = tmp_path_factory.mktemp("score")
    for layout in ("pairs", "lists", "unpaired"):
        write_data(folder / f"{layout}.jsonl", layout)
    save_model(folder / "model")
    save_model(folder / "other", seed=1)
    (folder / "judge.py").write_text(JUDGE)
    return folder


def call(given: Path, out: Path, *more: object, data: str = "pairs.jsonl") -> list[str]:
    words = ["score", "--dataset", given / data, "--output", out, "--disable-tqdm",
             "--device", "cpu", "--max-length", 64, "--batch-size", 4]  # fmt: skip
    return [str(word) for word in (*words, *more)]


def judged(given: Path, out: Path, name: str, *more: object, data: str = "pairs.jsonl") -> int:
    return main(call(given, out, "--judge", f"{given}/judge.py:{name}", *more, data=data))


@pytest.mark.parametrize("layout", ["pairs", "lists", "unpaired"])
def test_columns_of_every_layout(given, tmp_path, layout):
    out, data = tmp_path / "out.jsonl", f"{layout}.jsonl"
    margin = ("--margin", "gap") if layout == "pairs" else ()
    assert judged(given, out, "length", "--name", "len", *margin, data=data) == 0
    for before, after in zip(rows_of(given / data), rows_of(out), strict=True):
        added = {k: v for k, v in after.items() if k not in before}
        assert before == {k: after[k] for k in before}
        if layout == "pairs":
            sizes = [float(len(before[side])) for side in ("chosen", "rejected")]
            assert added == {
                "chosen_len": sizes[0], "rejected_len": sizes[1], "gap": sizes[0] - sizes[1],
            }  # fmt: skip
        elif layout == "lists":
            assert added == {"len": [float(len(text)) for text in before["responses"]]}
        else:
            assert added == {"len": float(len(before["completion"]))}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]


def test_implicit_reward_and_mean_log_probability(given, tmp_path):
    rows, settings = rows_of(given / "pairs.jsonl"), config("o", "m", "d")
    models = {name: tiny_model(seed=seed) for name, seed in (("model", 0), ("other", 1))}
    logps = {
        name: answer_logps(model, byte_tokenizer(), rows, [r["chosen"] for r in rows], settings)
        for name, model in models.items()
    }
    out = tmp_path / "a.jsonl"
    more = ("--model", given / "model", "--ref-model", given / "other", "--beta", 0.5)
    assert main(call(given, out, *more)) == 0
    sums = [0.5 * float((a - b).sum()) for a, b in zip(*logps.values(), strict=True)]
    assert [row["chosen_score"] for row in rows_of(out)] == pytest.approx(sums, abs=1e-4)
    out = tmp_path / "b.jsonl"
    assert main(call(given, out, "--model", given / "model", given / "other")) == 0
    means = [float(a.mean() + b.mean()) / 2 for a, b in zip(*logps.values(), strict=True)]
    assert [row["chosen_score"] for row in rows_of(out)] == pytest.approx(means, abs=1e-4)


def test_reward_models_with_one_and_two_outputs(given, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    for outputs in (1, 2):
        settings = LlamaConfig(
            vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
            num_labels=outputs,
        )  # fmt: skip
        torch.manual_seed(outputs)
        model = LlamaForSequenceClassification(settings).eval()
        folder = tmp_path / f"rm{outputs}"
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        out = tmp_path / f"{outputs}.jsonl"
        assert main(call(given, out, "--judge-model", folder, "--margin", "gap")) == 0
        row = rows_of(out)[3]
        ids = byte_tokenizer()(row["prompt"] + row["chosen"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(ids).logits[0].tolist()
        found = row["chosen_score"]
        assert (found if outputs == 2 else [found]) == pytest.approx(expected, abs=1e-5)
        assert isinstance(row["gap"], list) == (outputs == 2)


def test_a_text_beyond_max_length_has_no_score(given, tmp_path, capsys):
    rows = [*rows_of(given / "pairs.jsonl"), {"prompt": "x" * 80, "chosen": "a", "rejected": "b"}]
    data = write_lines(tmp_path / "d.jsonl", rows)
    assert main(call(tmp_path, tmp_path / "o.jsonl", "--model", given / "model", data=data)) == 0
    assert rows_of(tmp_path / "o.jsonl")[-1]["chosen_score"] is None
    assert "1 of 13 rows have no score" in capsys.readouterr().err


def test_parquet_keeps_its_types_and_gzip_its_rows(given, tmp_path):
    import pyarrow as pa

    rows = rows_of(given / "lists.jsonl")
    table = pa.table(
        {
            "prompt": [r["prompt"] for r in rows],
            "responses": [r["responses"] for r in rows],
            "rank": pa.array(range(len(rows)), pa.int16()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    out = tmp_path / "out.parquet"
    assert judged(given, out, "length", data=tmp_path / "in.parquet") == 0
    found = pq.read_table(out)
    assert found.schema.field("rank").type == pa.int16()
    assert found.select(table.column_names).equals(table)
    assert found["score"].to_pylist() == [[float(len(x)) for x in r["responses"]] for r in rows]
    assert judged(given, tmp_path / "o.jsonl.gz", "length") == 0
    with gzip.open(tmp_path / "o.jsonl.gz", "rt") as file:
        assert json.loads(file.readline())["chosen_score"] > 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "exactly one source of scores"),
        (["--judge", "judge.py:length", "--model", "m"], "exactly one source of scores"),
        (["--judge", "none.py:f"], "there is no file none.py"),
        (["--judge-model", "/none"], "judge_model: there is no model folder '/none'"),
        (["--model", "/none"], "model: there is no model folder '/none'"),
        (["--dataset", "/none.jsonl"], "there is no file '/none.jsonl'"),
        (["--output", "x.csv"], "the name must end in .jsonl or .jsonl.gz"),
        (["--max-lenght", "3"], "unknown option --max-lenght; nearest: max-length"),
        (["--batch-size", "0"], "batch_size must be a finite number >= 1"),
        (["--beta", "nan"], "beta must be a finite number >= 0"),
        (["--column", "promt=x"], "column must be written name=column"),
        (["--prep", "score_condition"], "no 'score_condition'; nearest: score_conditioned"),
        (["--prep", "score_conditioned:tmplate=x"], "nearest: template"),
    ],
)
def test_mistakes_are_one_line(given, tmp_path, capsys, words, text):
    judge = () if "source of scores" in text else ("--judge", f"{given}/judge.py:length")
    if words[:1] in (["--model"], ["--judge-model"]):
        judge = ()
    assert main(call(given, tmp_path / "out.jsonl", *judge, *words)) == 2
    assert text in told(capsys)
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_users_is_replaced(given, tmp_path, capsys):
    data = write_lines(tmp_path / "d.jsonl", rows_of(given / "pairs.jsonl"))
    before = data.read_bytes()
    assert judged(given, data, "length", "--overwrite", data=data) == 2
    assert "is the data set itself" in told(capsys)
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    assert judged(given, out, "length", data=data) == 2
    assert "exists; name a new file" in told(capsys) and out.read_text() == "mine"
    assert judged(given, tmp_path / "n.jsonl", "length", "--name", "{answer}", data=data) == 2
    assert "column 'chosen' is there already" in told(capsys)
    foreign = tmp_path / ".prefkern-n.jsonl.work"
    foreign.write_text("not ours\n")
    assert judged(given, tmp_path / "n.jsonl", "length", "--overwrite", data=data) == 2
    assert "is no file of this command" in told(capsys) and foreign.read_text() == "not ours\n"
    finished = tmp_path / ".prefkern-m.jsonl.whole"
    finished.write_text("not ours\n")
    for more in ((), ("--overwrite",)):
        assert judged(given, tmp_path / "m.jsonl", "length", *more, data=data) == 2
        assert "is no file of this command" in told(capsys)
    assert (
        finished.read_text() == "not ours\n" and not (tmp_path / ".prefkern-m.jsonl.work").exists()
    )
    assert judged(given, out, "length", "--overwrite", data=data) == 0
    assert len(rows_of(out)) == 12 and data.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nan", "must give finite numbers, got nan"),
        ("short", "must give one score per answer (2), got [1.0]"),
        ("ragged", "as many scores as the others"),
        ("broken", "failed: KeyError: 'no such column'"),
    ],
)
def test_a_judge_that_gives_no_scores(given, tmp_path, capsys, name, words):
    assert judged(given, tmp_path / "out.jsonl", name) == 2
    line = told(capsys)
    assert words in line and "pairs.jsonl:" in line and "rows are done and kept" in line
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_without_scores(given, tmp_path, capsys):
    assert main(call(given, tmp_path / "o.jsonl", "--judge-model", given / "model")) == 2
    assert "LlamaForCausalLM) has no scores" in told(capsys)


def test_missing_columns(given, tmp_path, capsys):
    rows = [
        {"question": r["prompt"], "chosen": r["chosen"]} for r in rows_of(given / "pairs.jsonl")
    ]
    data = write_lines(tmp_path / "d.jsonl", rows)
    assert judged(given, tmp_path / "o.jsonl", "length", data=data) == 2
    assert "the columns found: 'question', 'chosen'" in told(capsys)
    rows = [row | {"rejected": "other words"} for row in rows]
    data = write_lines(data, rows)
    assert judged(given, tmp_path / "o.jsonl", "length", data=data) == 2
    assert "--column prompt=question" in told(capsys)
    assert judged(given, tmp_path / "o.jsonl", "length", "--column", "prompt=question",
                  data=data) == 0  # fmt: skip
    assert rows_of(tmp_path / "o.jsonl")[0]["question"] == rows[0]["question"]
    data.write_text(data.read_text() + "{broken\n")
    assert judged(given, tmp_path / "p.jsonl", "length", data=data) == 2
    assert "d.jsonl:13" in told(capsys)


def test_what_is_done_survives_an_error_of_the_judge(given, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert judged(given, out, "once") == 2
    assert "8 of 12 rows are done and kept; the same command continues" in told(capsys)
    (given / "asked").unlink()
    assert judged(given, out, "length") == 2  # another judge's numbers would be mixed
    assert "was begun with other judge" in told(capsys)
    assert judged(given, out, "once") == 0
    assert [x.split(":")[0] for x in (given / "asked").read_text().splitlines()] == [
        "8", "9", "10", "11",
    ]  # fmt: skip
    assert len(rows_of(out)) == 12
    (given / "flag").unlink()


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_a_batch() -> None:
    original, calls = work.os.fsync, []
    work.os.fsync = lambda handle: die() if len(calls) == 2 else calls.append(original(handle))


def killed_before_the_name() -> None:
    work.os.link = die


def killed_behind_it() -> None:
    Work.clear = die


@pytest.mark.parametrize("point", [killed_in_a_batch, killed_before_the_name, killed_behind_it])
def test_a_killed_run_continues(given, tmp_path, point):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert judged(given, whole, "length") == 0
    words = call(given, out, "--judge", f"{given}/judge.py:length")
    child = os.fork()
    if child == 0:
        point()
        os._exit(main(words))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert out.exists() == (point is killed_behind_it)
    if point is killed_in_a_batch:
        left = tmp_path / ".prefkern-out.jsonl.work"
        assert len(left.read_text().splitlines()) > 1
        with left.open("a") as file:
            file.write("[[1.0, 2")  # half a line
    if point is killed_behind_it:  # another command's file, to be replaced, is no such rest
        beside = call(given, out, "--judge", f"{given}/judge.py:two", "--overwrite")
        assert main(beside) == 0 and rows_of(out)[0]["chosen_score"][0] == 1.0
        words.append("--overwrite")
    assert main(words) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


def test_a_reference_with_other_tokens(given, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_model(seed=2).save_pretrained(other)
    tokenizer = byte_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    tokenizer.save_pretrained(other)
    file = other / "tokenizer.json"
    swapped = json.loads(text)
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(swapped))
    more = ("--model", given / "model", "--ref-model", other)
    assert main(call(given, tmp_path / "o.jsonl", *more)) == 2
    assert "the tokenizers of" in told(capsys)


def test_two_commands_on_one_file(given, tmp_path):
    held = Work(tmp_path / "out.jsonl", {}, overwrite=False)
    settings = ScoreConfig(
        dataset=str(given / "pairs.jsonl"), output=str(tmp_path / "out.jsonl"), device="cpu",
        judge=f"{given}/judge.py:length", disable_tqdm=True,
    )  # fmt: skip
    try:
        with pytest.raises(ValueError, match="another command is writing"):
            score(settings)
    finally:
        held.close()


def test_what_stands_before_a_damaged_line_is_kept(tmp_path):
    out, key = tmp_path / "o.jsonl", {"a": 1}
    held = Work(out, key, overwrite=False)
    held.add([[1.0], [2.0]])
    held.close()
    with held.path.open("a") as file:
        file.write("[[3.0]\n[[9.0]]\n")
    again = Work(out, key, overwrite=False)
    assert again.rows == [[1.0], [2.0]]
    again.add([[4.0]])
    again.close()
    third = Work(out, key, overwrite=False)
    third.close()
    assert third.rows == [[1.0], [2.0], [4.0]]


def test_an_output_that_a_kill_left_linked_is_finished(tmp_path):
    out, key = tmp_path / "o.jsonl", {"a": 1}
    held = Work(out, key, overwrite=False)
    held.add([[1.0]])
    held.close()
    out.write_text("{}\n")
    os.link(out, tmp_path / ".prefkern-o.jsonl.whole")
    assert work.check_output(str(out), "d.jsonl", parquet=False, overwrite=False) == out
    again = Work(out, key, overwrite=False)
    assert again.finished(1)
    again.clear()
    assert not again.finished(1)
    again.close()
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]
    with pytest.raises(ValueError, match=r"o\.jsonl exists; name a new file"):
        work.check_output(str(out), "d.jsonl", parquet=False, overwrite=False)


def test_prep_comes_last_and_loses_nothing(given, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert judged(given, out, "length", "--prep", "score_conditioned") == 2
    assert "must be below chosen_score" in told(capsys)  # some rejected answers are longer
    assert judged(given, out, "length") == 0  # nothing is asked again, the numbers are there
    assert all(math.isfinite(row["chosen_score"]) for row in rows_of(out))


def test_conversations(given, tmp_path):
    turn = [{"role": "user", "content": "hi"}]
    rows = [
        {
            "prompt": turn,
            "chosen": [{"role": "assistant", "content": "abc"}],
            "rejected": [{"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}],
        }
    ]
    data = write_lines(tmp_path / "d.jsonl", rows)
    assert judged(given, tmp_path / "o.jsonl", "length", data=data) == 0
    row = rows_of(tmp_path / "o.jsonl")[0]
    assert (row["chosen_score"], row["rejected_score"]) == (3.0, 2.0)  # text; two messages


def test_answers_without_a_score_say_why(given, tmp_path, capsys):
    rows = [
        {"prompt": [{"role": role, "content": "Hi"}], "completion": [
            {"role": "assistant", "content": "yes"}]}
        for role in ("robot", "user", "robot")
    ]  # fmt: skip
    write_lines(given / "roles.jsonl", rows)
    model = save_model(tmp_path / "chat")
    byte_tokenizer(chat=True).save_pretrained(model)
    words = call(given, tmp_path / "o.jsonl", "--model", model, data="roles.jsonl")
    assert main(words) == 0
    said = capsys.readouterr().err
    assert said.count("answers without a score: column 'prompt': refused by the chat template") == 1
    assert "2 of 3 rows have no score" in said
    scores = [row["score"] for row in rows_of(tmp_path / "o.jsonl")]
    assert scores[0] is None is scores[2] and scores[1] < 0
    write_lines(given / "roles.jsonl", rows[::2])
    assert main(call(given, tmp_path / "p.jsonl", "--model", model, data="roles.jsonl")) == 2
    assert "no row has a score for every answer, so nothing is written" in told(capsys)
    assert not (tmp_path / "p.jsonl").exists()


def test_a_full_disk_is_told_with_its_file(tmp_path, monkeypatch):
    """What is left in the buffer is written again when the file is closed."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        held = Work(tmp_path / "o.jsonl", {"a": 1}, overwrite=False)
        held._file.close()
        monkeypatch.setattr(held, "_file", full)
        try:
            with pytest.raises(OSError, match=r"\.work could not be written: No space left"):
                held.add([[1.0]])
        finally:
            held.close()
