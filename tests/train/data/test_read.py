"""Reading rows: every bad line is named by line, column and reason, and never stops the rest."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest
from tiny_tokenizer import byte_tokenizer

from prefkern.train.data import Loader
from prefkern.train.data.read import raw_rows

TOKENIZER = byte_tokenizer()


def pair(i: int) -> dict:
    return {"prompt": f"question {i}: ", "chosen": f"good {i}", "rejected": f"bad {i}"}


def write_lines(path, lines, *, compress=False):
    data = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
    path.write_bytes(gzip.compress(data) if compress else data)
    return path


def load(source, **options):
    where = {name: options.pop(name) for name in ("split", "limit") if name in options}
    return Loader(tokenizer=TOKENIZER, **options).load(source, **where)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
def test_json_lines(tmp_path, compress):
    path = write_lines(tmp_path / "a.jsonl.gz", [pair(i) for i in range(5)], compress=compress)
    examples, layout, report = load(path)
    assert layout == "pairs" and [e.row for e in examples] == [1, 2, 3, 4, 5]
    assert (report.rows, report.kept, report.total) == (5, 5, 0)
    text = TOKENIZER.decode(examples[3].sequences[1].input_ids)
    assert text == "question 3: bad 3</s>"


BAD_LINES = {
    "not UTF-8": (b'{"prompt": "\xff"}', "byte 13 of the line is not UTF-8"),
    "not JSON": (b'{"prompt": ', "character 12 of the line"),
    "torn number": (b'{"prompt": 1' + b"1" * 5000 + b"}", "digit"),
    "deep": (b"[" * 200_000, "recursion"),
    "not an object": (b"[1, 2]", "must hold a JSON object, got list"),
    "null": (b"null", "got null"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named_and_the_rest_read(tmp_path, name):
    line, reason = BAD_LINES[name]
    path = write_lines(tmp_path / "a.jsonl", [pair(0), line, b"", pair(1)])
    examples, _, report = load(path)
    assert [e.row for e in examples] == [1, 4], "the blank line keeps its number and is no row"
    assert report.total == 1 and report.rows == 3
    assert report.examples[0].startswith("a.jsonl:2: ") and reason in report.examples[0]
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*strict"):
        load(path, strict=True)


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(pair(i)).encode() for i in range(3)))
    assert len(load(path).examples) == 3


def test_truncated_gzip_gives_what_was_before(tmp_path):
    path = write_lines(tmp_path / "a.jsonl.gz", [pair(i) for i in range(2000)], compress=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    examples, _, report = load(path)
    # An independent count: what zlib gives back for the same bytes.
    readable = zlib.decompressobj(31).decompress(whole[: len(whole) // 2]).count(b"\n")
    assert 500 < readable < 2000
    assert [e.row for e in examples] == list(range(1, readable + 1))
    assert report.counts == {"damaged file": 1} and report.rows == readable
    assert f"{readable} whole lines were read before" in report.examples[0]
    with pytest.raises(ValueError, match=r"truncated.*strict"):
        load(path, strict=True)


def test_only_the_gzip_trailer_is_missing(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = "\n".join(json.dumps(pair(i)) for i in range(7)).encode()  # no newline at the end
    path.write_bytes(gzip.compress(lines)[:-8])
    examples, _, report = load(path)
    assert len(examples) == 7 and report.counts == {"damaged file": 1}


def test_damage_in_the_middle_of_a_gzip_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl.gz", [pair(i) for i in range(2000)], compress=True)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(data))
    examples, _, report = load(path)
    assert len(examples) > 500 and report.counts["damaged file"] == 1
    for example in examples[:500]:
        i = example.row - 1
        assert TOKENIZER.decode(example.sequences[0].input_ids) == f"question {i}: good {i}</s>"


def test_gzip_members_behind_each_other(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    parts = [json.dumps(pair(i)).encode() + b"\n" for i in range(3)]
    path.write_bytes(b"".join(gzip.compress(part) for part in parts) + bytes(16))
    examples, _, report = load(path)
    assert len(examples) == 3 and report.total == 0


@pytest.mark.parametrize("content", [b"", b"\n\n", gzip.compress(b"")], ids=["0", "blank", "gz"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no rows"):
        load(path)


def test_no_usable_row_says_why(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{**pair(0), "prompt": ""}])
    with pytest.raises(
        ValueError, match=r"(?s)no row of .*a\.jsonl:1 column 'prompt': has no text"
    ):
        load(path)


def test_json_array_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([pair(0)], indent=1))
    with pytest.raises(ValueError, match="one object per line"):
        load(path)


def test_missing_file_and_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*nowhere\.jsonl"):
        load(tmp_path / "nowhere.jsonl")
    (tmp_path / "a.csv").write_text("prompt,chosen")
    with pytest.raises(ValueError, match="cannot tell the format"):
        load(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="source must be a path"):
        load(3)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [pair(i) for i in range(10)]
    rows[4]["rejected"] = None
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, path, row_group_size=3)
    examples, layout, report = load(path)
    assert layout == "pairs" and [e.row for e in examples] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert report.examples == ["a.parquet:5 column 'rejected': is null"]

    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        load(path)


def test_damaged_parquet_row_group_loses_only_itself(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([pair(i) for i in range(9)])
    parquet.write_table(table, path, row_group_size=3, compression="gzip")
    data = bytearray(path.read_bytes())
    group = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    start = group.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(bytes(data))
    examples, _, report = load(path)
    assert [e.row for e in examples] == [1, 2, 3, 7, 8, 9]
    assert report.counts == {"damaged file": 1} and "a.parquet:4: 3 rows" in report.examples[0]


def test_parquet_conversations_lose_the_filled_in_nulls(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    chat = byte_tokenizer(chat=True)
    rows = [
        {
            "prompt": [{"role": "user", "content": "hi", "name": "x"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    sequence = Loader(tokenizer=chat).load(path).examples[0].sequences[0]
    assert chat.decode(sequence.input_ids) == "[user]hi</s>[assistant]yes</s>"


def test_datasets_objects_and_folders(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [pair(i) for i in range(4)]
    data = datasets.Dataset.from_list(rows)
    want = [e.sequences[0].input_ids.tolist() for e in load(rows).examples]

    def ids(source, **options):
        return [e.sequences[0].input_ids.tolist() for e in load(source, **options).examples]

    assert ids(data) == ids(data.to_iterable_dataset()) == want
    splits = datasets.DatasetDict({"train": data, "test": data.select([1])})
    assert ids(splits) == want and ids(splits, split="test") == want[1:2]
    with pytest.raises(ValueError, match=r"no split 'dev'; the data set has \['test', 'train'\]"):
        ids(splits, split="dev")
    data.save_to_disk(str(tmp_path / "one"))
    splits.save_to_disk(str(tmp_path / "two"))
    assert ids(tmp_path / "one") == want and ids(tmp_path / "two", split="test") == want[1:2]
    (tmp_path / "files").mkdir()
    write_lines(tmp_path / "files" / "train.jsonl", rows)
    assert ids(str(tmp_path / "files")) == want
    with pytest.raises(ValueError, match="datasets could not load"):
        ids(str(tmp_path / "files"), split="dev")


def test_rows_of_an_iterable_are_named_by_index():
    report = load([pair(0), 3, {"prompt": "x", "chosen": "y"}]).report
    assert report.examples[0] == "data[1]: a row must be a mapping, got int"
    assert report.examples[1].startswith("data[2] column 'rejected': is missing; the row's columns")


def test_reading_is_lazy(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [pair(0)] * 3)
    rows = raw_rows(path)
    assert next(rows).where == "a.jsonl:1"
    assert len(load(path, limit=2).examples) == 2


def test_report_is_capped_but_counts_all():
    rows = [pair(0)] + [{**pair(1), "prompt": " "}] * 80
    report = load(rows).report
    assert report.total == 80 and len(report.examples) == 50
    assert (report.rows, report.kept) == (81, 1)
    assert "80 x column 'prompt': empty" in str(report) and "and 30 more" in str(report)
    assert report.as_dict()["reasons"] == {"column 'prompt': empty": 80}
