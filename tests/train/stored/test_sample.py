"""`prefkern sample`: the same answers after a kill, columns, what is left out and refused."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from online_model import letters_model
from stored_commands import rows_of, told, write_lines

from prefkern.cli.main import main
from prefkern.train import models
from prefkern.train.stored import sample as module
from prefkern.train.stored.sample import batch_seed

JUDGE = """
def share(row, answers):
    return [text.count("a") / max(len(text), 1) for text in answers]

def nan(row, answers):
    return [float("nan")] * len(answers)
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    letters_model(folder)
    (folder / "judge.py").write_text(JUDGE)
    rows = [{"prompt": f"{x}:", "id": i} for i, x in enumerate("pqrspq")]
    write_lines(folder / "p.jsonl", rows)
    return folder


def call(given, out, *more, data=None) -> int:
    words = [
        "sample", "--model", given / "letters0", "--dataset", data or given / "p.jsonl", "--output",
        out, "--disable-tqdm", "--device", "cpu", "--max-length", 64, "--batch-size", 2,
        "--num-generations", 3, "--max-new-tokens", 8, *more,
    ]  # fmt: skip
    return main([str(word) for word in words])


def test_answers_columns_and_seeds(given, tmp_path):
    out = tmp_path / "a.jsonl"
    assert call(given, out, "--judge", f"{given}/judge.py:share") == 0
    rows = rows_of(out)
    assert [row["id"] for row in rows] == list(range(6))
    for row in rows:
        assert len(row["completions"]) == len(row["finished"]) == len(row["scores"]) == 3
        for text, number in zip(row["completions"], row["scores"], strict=True):
            assert number == text.count("a") / max(len(text), 1)
    assert call(given, tmp_path / "b.jsonl", "--seed", 1) == 0
    assert call(given, tmp_path / "c.jsonl") == 0
    texts = [[r["completions"] for r in rows_of(tmp_path / f"{x}.jsonl")] for x in "abc"]
    assert texts[0] == texts[2] != texts[1]
    assert texts[0][0] != texts[0][4]  # the same prompt in another batch
    assert len({batch_seed(seed, start) for seed in range(9) for start in range(9)}) == 81


def test_an_interrupted_run_gives_the_same_answers(given, tmp_path, monkeypatch, capsys):
    assert call(given, tmp_path / "whole.jsonl") == 0
    original, calls = module.sampling.sample_answers, []

    def interrupted(*args, **options):
        calls.append(options["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(module.sampling, "sample_answers", interrupted)
    assert call(given, tmp_path / "parts.jsonl") == 130
    assert call(given, tmp_path / "parts.jsonl", "--temperature", 0.5) == 2
    assert "was begun with other temperature" in told(capsys)
    assert call(given, tmp_path / "parts.jsonl") == 0
    assert len(calls) == 4  # the third batch was asked for again, the others were not
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_is_left_out_is_told(given, tmp_path, capsys):
    rows = [
        {"prompt": "p:", "chosen": "x", "rejected": "y", "scores": [1], "kept": 3},
        {"prompt": "q" * 60, "chosen": "x", "rejected": "y"},
    ]
    data = write_lines(tmp_path / "d.jsonl", rows)
    assert call(given, tmp_path / "o.jsonl", "--distinct", "--drop-unfinished", data=data) == 0
    (row,) = rows_of(tmp_path / "o.jsonl")
    assert set(row) == {"prompt", "kept", "completions", "finished"}
    assert len(set(row["completions"])) == len(row["completions"]) and all(row["finished"])
    said = capsys.readouterr().err
    assert "columns of other answers are left out: chosen, rejected, scores" in said
    assert "1 prompts leave no room" in said and "d.jsonl:2" in said


def test_parquet_and_conversations(given, tmp_path, monkeypatch):
    turn = [{"role": "user", "content": "p:"}]
    pq.write_table(pa.table({"prompt": [turn, turn], "chosen": ["x", "y"]}), tmp_path / "d.parquet")
    load = models.load_tokenizer

    def with_template(name):
        tokenizer = load(name)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        return tokenizer

    monkeypatch.setattr(models, "load_tokenizer", with_template)
    assert call(given, tmp_path / "o.parquet", data=tmp_path / "d.parquet") == 0
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.column_names == ["prompt", "completions", "finished"]
    (answer,) = table["completions"].to_pylist()[0][0]
    assert answer["role"] == "assistant" and isinstance(answer["content"], str)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--temperature", 0], "temperature=0 gives the same answer every time"),
        (["--top-p", 0], "top_p must be in (0, 1]"),
        (["--num-generations", 0], "num_generations must be a finite number >= 1"),
        (["--max-new-tokens", 63], "leaves no room for a prompt"),
        (["--judge", "x.py:f"], "there is no file x.py"),
        (["--judge", "x.py:f", "--judge-model", "m"], "two sources of scores"),
        (["--model", "/none"], "model: there is no model folder '/none'"),
        (["--column", "prompt=question"], "has no column 'question', from which prompt is to be"),
    ],
)
def test_mistakes_are_one_line(given, tmp_path, capsys, words, text):
    assert call(given, tmp_path / "o.jsonl", *words) == 2
    assert text in told(capsys) and list(tmp_path.iterdir()) == []


def test_a_judge_that_gives_no_number(given, tmp_path, capsys):
    assert call(given, tmp_path / "o.jsonl", "--judge", f"{given}/judge.py:nan") == 2
    line = told(capsys)
    assert "must give finite numbers, got nan" in line and "p.jsonl:1 to p.jsonl:2" in line
    assert not (tmp_path / "o.jsonl").exists()


def test_pictures_are_refused(given, tmp_path, capsys):
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "p:", "image": "cat.png"}])
    assert call(given, tmp_path / "o.jsonl", data=data) == 2
    assert "d.jsonl:1: column 'image' holds pictures" in told(capsys)


def test_a_missing_prompt(given, tmp_path, capsys):
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "p:"}, {"question": "q:"}])
    assert call(given, tmp_path / "o.jsonl", data=data) == 2
    assert "d.jsonl:2 column 'prompt': is missing" in told(capsys)
