"""Which checkpoints are whole: a mark with the size and checksum of every file, written last."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .config import short_hash
from .output import MARK, list_checkpoints, read_mark

STATE_FILE = "prefkern_state.json"


def find_resume(choice: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume_from_checkpoint` means, and what to say of it; None: start from
    the beginning.

    Raises:
        ValueError: it is damaged (the newest whole one is named), or is no checkpoint.
    """
    if choice is None:
        return None, []
    if choice.lower() not in ("auto", "true"):
        path = Path(choice)
        if not (path / STATE_FILE).is_file():
            raise ValueError(
                f"{path} is not a checkpoint of this trainer (no {STATE_FILE}); pass a "
                "checkpoint-N folder, or auto for the newest in output_dir."
            )
        if (why := damage(path)) is not None:
            raise ValueError(f"{path} is damaged: {why}; {last_whole(path.parent)}.")
        return path, []
    notes: list[str] = []
    for path in reversed(list_checkpoints(output_dir)):
        if (why := damage(path)) is None:
            return path, notes
        notes.append(f"{path} is damaged ({why}) and is passed over")
    if notes:
        raise ValueError(f"no checkpoint in {output_dir} is whole: {'; '.join(notes)}.")
    return None, []


def last_whole(output_dir: Path) -> str:
    """What can be continued from, in words."""
    for path in reversed(list_checkpoints(output_dir)):
        if damage(path) is None:
            return f"the last whole checkpoint is {path}"
    return "there is no whole checkpoint"


def seal(folder: Path, run: str, known: dict[str, list[int]] | None = None) -> None:
    """Writes the mark of a finished checkpoint: its run, and size and checksum of every file; those
    of `known` were summed by the processes that wrote them.

    Raises:
        OSError: a file of `known` is not there.
    """
    known = known or {}
    if lacking := [name for name in known if not (folder / name).is_file()]:
        raise OSError(
            2,
            f"{lacking[0]}, written by another process, is not there: output_dir must be on a file "
            "system that all processes share",
        )
    files = file_sums(folder, [name for name in _files(folder) if name not in known]) | known
    content = {"run": run, "files": files}
    write_json(folder / MARK, content | {"check": short_hash(content)})


def damage(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is not as it was written, and how; None: all are."""
    mark = read_mark(checkpoint)
    if mark is None:
        return f"{MARK} is missing or cannot be read"
    files = mark.get("files")
    if not isinstance(files, dict) or mark.get("check") != short_hash(
        {"run": mark["run"], "files": files}
    ):
        return f"{MARK} was changed"
    for name in files:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        size = (checkpoint / name).stat().st_size
        if size != files[name][0]:
            return f"{name} has {size} bytes and was written with {files[name][0]}"
    for name, found in file_sums(checkpoint, files).items():
        if found != files[name]:
            return f"the bytes of {name} changed since it was written"
    return None


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def file_sums(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Of files below `folder`, several at a time: zlib leaves the interpreter to others."""
    names = list(names)
    with ThreadPoolExecutor(4) as pool:
        sums = pool.map(lambda name: file_sum(folder / name), names)
        return dict(zip(names, sums, strict=True))


def file_sum(path: Path) -> list[int]:
    """Size and CRC-32."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
