"""Rows from JSON lines (plain or gzip), Parquet, a `datasets` name or object, or an iterable.

JSON lines are read here and not by `datasets`, which stops at the first bad line and cannot name
it. Nothing in this file judges the content of a row.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from .key_order import PLAIN, KeyOrder

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
GZIP_MAGIC = b"\x1f\x8b"
BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as stored, or the reason why it could not be read."""

    where: str  # "file.jsonl:17" or "name[17]"
    row: int
    data: Mapping[str, Any] | None
    kind: str = ""  # the reason without numbers, for counting; empty when data is there
    detail: str = ""


def raw_rows(source: Any, split: str | None = None) -> Iterator[RawRow]:
    """Yields the rows of a source in order, unreadable ones included.

    Args:
        source: Path of a JSON-lines file (plain or gzip, told by its first bytes) or a Parquet
            file; a folder or name for `datasets.load_dataset` or `datasets.load_from_disk`; a
            `datasets` object; or an iterable of mappings.
        split: Split of a `datasets` name, folder or DatasetDict, default "train". A lone file, a
            Dataset and an iterable are one split already, so it is not read there.

    Raises:
        ValueError: No such file or data set, no such split, or a file that is not what it says.
    """
    return _in_order(_stored_rows(source, split))


def _in_order(rows: Iterator[RawRow]) -> Iterator[RawRow]:
    """The rows with the keys of objects in one order; see key_order.py."""
    order: dict[str, KeyOrder] = {}
    for row in rows:
        try:
            nested = {}
            for name, value in (row.data or {}).items():
                if type(value) in PLAIN:
                    continue
                if name not in order:
                    order[name] = KeyOrder()
                if (ordered := order[name](value)) is not value:
                    nested[name] = ordered
        except RecursionError:
            text = "objects and lists stand in each other too deeply"
            yield RawRow(row.where, row.row, None, "not JSON", text)
            continue
        yield replace(row, data={**row.data, **nested}) if nested and row.data else row


def _stored_rows(source: Any, split: str | None) -> Iterator[RawRow]:
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_file():
            if path.suffix == ".parquet":
                return _parquet(path)
            if path.name.endswith(JSON_SUFFIXES):
                return _json_lines(path)
            raise ValueError(
                f"cannot tell the format of {path}: the name must end in .parquet or one of "
                f"{', '.join(JSON_SUFFIXES)}. Other formats (csv, text) are read by `datasets` "
                "from a folder that holds nothing else."
            )
        return _hub_or_folder(source, split)
    if isinstance(source, Mapping):
        return _mapping_rows(_pick_split(source, split), "data")
    if isinstance(source, Iterable):
        return _mapping_rows(source, "data")
    raise ValueError(
        "source must be a path, a `datasets` name or object, or an iterable of mappings, "
        f"got {type(source).__name__}."
    )


def folder_of(source: Any) -> Path:
    """Where relative paths in the rows of a source start: its folder, else the working folder."""
    path = Path(source) if isinstance(source, str | Path) else Path()
    return path.parent if path.is_file() else path if path.is_dir() else Path()


def _pick_split(splits: Mapping[str, Any], split: str | None) -> Any:
    name = split or "train"
    if name not in splits:
        raise ValueError(
            f"there is no split {name!r}; the data set has {sorted(splits)} (--dataset-split, and "
            "--eval-split of --eval-dataset)."
        )
    return splits[name]


def check_source(source: str | Path) -> None:
    """Refuses a path that can be seen to lead nowhere, before anything else is read.

    Raises:
        ValueError: it has the form of a path and there is nothing.
    """
    path, text = Path(source), str(source)
    if text and path.exists():
        return
    local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    if local or path.suffix == ".parquet" or path.name.endswith(JSON_SUFFIXES) or not text:
        raise ValueError(f"there is no file {text!r}; check the path (here: {Path.cwd()}).")


def _hub_or_folder(source: str | Path, split: str | None) -> Iterator[RawRow]:
    path, text = Path(source), str(source)
    check_source(source)
    import datasets

    if path.is_dir() and (
        (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    ):
        try:
            stored = datasets.load_from_disk(text)
        except MemoryError:
            raise
        except Exception as error:  # whatever arrow, json or datasets make of a broken folder
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{text} holds no rows, or is not a whole folder of Dataset.save_to_disk: {reason}"
            ) from error
        if isinstance(stored, Mapping):
            stored = _pick_split(stored, split)
        return _mapping_rows(stored, path.name)
    try:
        data = datasets.load_dataset(text, split=split or "train")
    except MemoryError:
        raise
    except Exception as error:  # of datasets, of the hub's client, of a reader of files
        reason = " ".join(str(error).split()) or type(error).__name__
        if error.__cause__ is not None:
            reason = f"{reason.rstrip('.')}: {' '.join(str(error.__cause__).split())}"
        raise ValueError(
            f"datasets could not load {text!r}, split {split or 'train'!r}: {reason.rstrip('.')}. "
            "Pass a path to a JSON-lines or Parquet file if one was meant."
        ) from error
    return _mapping_rows(data, text)


def _mapping_rows(rows: Iterable[Any], name: str) -> Iterator[RawRow]:
    iterator, index = iter(rows), -1
    while True:
        index += 1
        try:
            data = next(iterator)
        except StopIteration:
            return
        except (OSError, ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            # a file of `datasets` that ends early, a picture that cannot be decoded
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{name}[{index}] cannot be read: {reason}") from error
        where = f"{name}[{index}]"
        if isinstance(data, Mapping):
            yield RawRow(where, index, data)
        else:
            yield RawRow(
                where, index, None, "not an object", f"a row must be a mapping, got {_kind(data)}"
            )


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a whole Parquet file: {error} Parquet keeps its index at the end, so "
            "a truncated file has no readable row; write or fetch it again."
        ) from error
    row = 0
    with file:
        for group in range(file.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            batches = file.iter_batches(batch_size=1024, row_groups=[group])
            # One row group at a time, so that damage in one loses only what is left of it.
            while row < end:
                try:
                    records = next(batches).to_pylist()
                except (pyarrow.ArrowException, OSError) as error:
                    detail = f"{end - row} rows of row group {group} cannot be read ({error})"
                    where = f"{path.name}:{row + 1}"
                    yield RawRow(where, row + 1, None, "damaged file", detail)
                    row = end
                    continue
                for data in records:
                    row += 1
                    yield RawRow(f"{path.name}:{row}", row, data)


def _json_lines(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        magic = file.read(2)
        file.seek(0)
        blocks = _gunzip(file) if magic == GZIP_MAGIC else iter(lambda: file.read(BLOCK), b"")
        number, rest = 0, b""
        try:
            for block in blocks:
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    number += 1
                    yield from _json_row(path, number, line)
        except _DamagedGzip as damage:
            # The start of an object is never itself an object, so what parses is a whole line.
            last = [row for row in _json_row(path, number + 1, rest) if row.data is not None]
            yield from last
            number += len(last)
            yield RawRow(
                f"{path.name}:{number + 1}",
                number + 1,
                None,
                "damaged file",
                f"{damage}; {number} whole lines were read before, the rest is lost",
            )
            return
        yield from _json_row(path, number + 1, rest)


def _json_row(path: Path, number: int, line: bytes) -> Iterator[RawRow]:
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return  # blank lines, as after the last row, are not rows
    where = f"{path.name}:{number}"
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        detail = f"byte {error.start + 1} of the line is not UTF-8 ({error.reason})"
        yield RawRow(where, number, None, "not UTF-8", detail)
        return
    except json.JSONDecodeError as error:
        if number == 1 and line.lstrip().startswith(b"["):
            raise ValueError(
                f"{path} begins a JSON array; write one object per line (JSON lines)."
            ) from error
        detail = f"character {error.pos + 1} of the line: {error.msg}"
        yield RawRow(where, number, None, "not JSON", detail)
        return
    except (ValueError, RecursionError) as error:
        # Integers of more than 4300 digits and nesting beyond the interpreter's limit.
        yield RawRow(where, number, None, "not JSON", str(error))
        return
    if isinstance(data, dict):
        yield RawRow(where, number, data)
        return
    if number == 1 and isinstance(data, list):
        raise ValueError(f"{path} begins a JSON array; write one object per line (JSON lines).")
    detail = f"a line must hold a JSON object, got {_kind(data)}"
    yield RawRow(where, number, None, "not an object", detail)


class _DamagedGzip(Exception):
    """The compressed stream ended early or does not decode."""


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    """Decompressed blocks of all members; what precedes damage is given out before raising.

    Python's gzip module raises out of its read buffer and so loses up to a buffer of good rows.
    """
    decoder, inside = zlib.decompressobj(wbits=31), False
    while True:
        block = file.read(BLOCK)
        if not block:
            if inside:
                raise _DamagedGzip("the gzip stream is truncated")
            return
        while block:
            if not inside:
                block = block.lstrip(b"\0")  # members may be padded with zeros
                if not block:
                    break
            before = decoder.copy()
            try:
                data = decoder.decompress(block)
            except zlib.error as error:
                yield _salvage(before, block)
                raise _DamagedGzip(f"the gzip stream is damaged ({error})") from error
            inside = not decoder.eof
            block = decoder.unused_data
            yield data
            if not inside:
                decoder = zlib.decompressobj(wbits=31)


def _salvage(decoder: Any, block: bytes) -> bytes:
    """What of a block decodes before the damage: zlib drops a call's output when it raises."""
    out = bytearray()
    for i in range(len(block)):
        try:
            out += decoder.decompress(block[i : i + 1])
        except zlib.error:
            break
    return bytes(out)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
