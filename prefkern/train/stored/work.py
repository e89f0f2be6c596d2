"""What is done of a command, kept beside its output until that is whole.

A file `.prefkern-NAME.work` holds the key of the command on its first line and one line per batch.
A kill loses the batch it falls in; the same command goes on behind the last whole line, and one
with other options refuses the file. The finished output is built under a name of its own and linked
to its own name, which replaces nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..output import check_writable, writing


def check_output(output: str, source: str, *, parquet: bool, overwrite: bool) -> Path:
    """The path of the new file, refused before anything is read.

    Raises:
        ValueError: it exists, is an input, cannot be written, or its ending fits no format.
    """
    path = Path(output)
    if path.name.endswith(".parquet") != parquet or not (
        parquet or path.name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"))
    ):
        wanted = ".parquet, as the data set's" if parquet else ".jsonl or .jsonl.gz"
        raise ValueError(f"output {output}: the name must end in {wanted}.")
    check_writable(path.parent, "output")
    if Path(source).exists() and path.resolve() == Path(source).resolve():
        raise ValueError(f"output {output} is the data set itself, which is never written to.")
    if path.is_symlink() or (os.path.lexists(path) and not path.is_file()):
        raise ValueError(f"output {output} is no plain file; name a new one.")
    if path.exists() and not overwrite and not _linked(path):
        raise ValueError(f"output {output} exists; name a new file, or pass --overwrite.")
    return path


def _whole(path: Path) -> Path:
    return path.with_name(f".prefkern-{path.name}.whole")


def _linked(path: Path) -> bool:
    """Whether a kill fell between the end of the output and the removal of what led to it."""
    whole = _whole(path)
    return path.exists() and whole.exists() and os.path.samefile(path, whole)


class Work:
    """The batches that are done, in the process that does the others.

    Args:
        output: The file to be made.
        key: What the numbers depend on, plain values.
        overwrite: Drop what a command with another key left.
    """

    def __init__(self, output: Path, key: Mapping[str, Any], *, overwrite: bool) -> None:
        self.output, self.path = output, output.with_name(f".prefkern-{output.name}.work")
        self.key, self.overwrite = json.loads(json.dumps(key)), overwrite
        with writing(self.path):
            output.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self._file: TextIO = os.fdopen(handle, "r+", encoding="utf-8", newline="\n")
        try:
            self._lock()
            self.rows = self._read()
        except BaseException:
            self.close()
            raise

    def finished(self, count: int) -> bool:
        """Whether the output of `count` rows is there and a kill fell just behind."""
        return _linked(self.output) and (len(self.rows) == count or not self.overwrite)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another command is writing {self.output}; wait for its end, or name another file."
            ) from None
        except OSError:  # a file system without locks
            return

    def _read(self) -> list[Any]:
        """The results of the rows that are done; the file then ends behind the last whole line."""
        rows: list[Any] = []
        data = os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0)
        lines = data.split(b"\n")[:-1]
        first = _json(lines[0]) if lines else None
        if not (isinstance(first, dict) and "prefkern" in first):
            if lines or not b'{"prefkern":'.startswith(data[:12]):
                raise ValueError(f"{self.path} is no file of this command's; move it away.")
            first = None  # nothing, or the start of the first line
            whole = _whole(self.output)
            # ours has a first line here before it, or is linked to the output
            if os.path.lexists(whole) and not _linked(self.output):
                if not data:
                    self.path.unlink()
                raise ValueError(f"{whole} is no file of this command's; move it away.")
        other = first is not None and first != {"prefkern": self.key}
        # where the first line is all, nothing is lost
        if first is not None and other and len(lines) > 1 and not self.overwrite:
            before = first["prefkern"]
            changed = sorted(k for k in {*self.key, *before} if self.key.get(k) != before.get(k))
            raise ValueError(
                f"{self.output} was begun with other {', '.join(changed)}; repeat that command to "
                "continue it, name another --output, or pass --overwrite to begin afresh."
            )
        end = 0
        if first == {"prefkern": self.key}:
            end = len(lines[0]) + 1
            for line in lines[1:]:
                batch = _json(line)
                if not isinstance(batch, list):
                    break
                rows += batch
                end += len(line) + 1
        with writing(self.path):
            os.ftruncate(self._file.fileno(), end)
            self._file.seek(end)
            if end == 0:
                self._append({"prefkern": self.key})
        return rows

    def _append(self, value: Any) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, results: list[Any]) -> None:
        """One more batch, a result per row."""
        with writing(self.path, lambda: f"{len(self.rows)} rows are done and kept"):
            self._append(results)
        self.rows += results

    def finish(self, write: Callable[[Path], None]) -> None:
        """Builds the output with `write` and gives it its name; what led to it is removed.

        Raises:
            ValueError: a file of that name has appeared.
            OSError: it cannot be written.
        """
        whole = _whole(self.output)
        with writing(self.output, lambda: "what was computed is kept, the same command continues"):
            whole.unlink(missing_ok=True)
            try:
                write(whole)
                with whole.open("rb") as file:
                    os.fsync(file.fileno())
            except BaseException:
                whole.unlink(missing_ok=True)
                raise
            if self.overwrite:
                os.replace(whole, self.output)
            else:
                try:
                    _link(whole, self.output)
                except FileExistsError:
                    raise ValueError(
                        f"{self.output} appeared while this command ran and is not replaced; the "
                        f"result is whole in {whole}."
                    ) from None
        self.clear()

    def clear(self) -> None:
        """Removes what led to the output."""
        self.path.unlink(missing_ok=True)
        _whole(self.output).unlink(missing_ok=True)

    def close(self) -> None:
        """Gives up the lock, and the file where nothing is done; a full disk was told where it was
        met."""
        with contextlib.suppress(OSError):  # of what is still in the buffer
            if getattr(self, "rows", None) == []:
                self.path.unlink(missing_ok=True)
            self._file.close()


def _link(whole: Path, output: Path) -> None:
    """Gives a file a second name that is free."""
    try:
        os.link(whole, output)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(output):
            raise FileExistsError(17, "File exists") from None
        os.rename(whole, output)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
