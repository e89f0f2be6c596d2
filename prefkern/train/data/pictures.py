"""Pictures as rows hold them: paths, bytes or PIL images; encoded until a batch is made."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...prep.cells import BadRow
from ...prep.messages import kind_of

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture; two are equal where their files have the same bytes."""

    digest: bytes  # [32] of the file
    where: str = field(compare=False)  # its file, or its column
    path: Path | None = field(default=None, compare=False)
    data: bytes | None = field(default=None, compare=False, repr=False)

    def open(self) -> Any:
        """The picture as a PIL image in RGB.

        Raises:
            ValueError: its file is gone or is another one by now.
            OSError: it is no picture that PIL reads, or not whole.
        """
        from PIL import Image

        data = self.data
        if self.path is not None:
            try:
                data = self.path.read_bytes()
            except OSError as error:
                raise ValueError(
                    f"the picture {self.where} was there when the data were read and cannot be "
                    f"read now: {error.strerror or error}."
                ) from error
            if _digest(data) != self.digest:
                raise ValueError(
                    f"the picture {self.where} changed since the data were read; start again."
                )
        assert data is not None
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")


def read_pictures(value: Any, column: str, folder: Path) -> tuple[Picture, ...]:
    """The pictures of one cell, one or several, each decoded once here.

    Args:
        value: A path, a PIL image, a mapping with `bytes` or `path` (as `datasets` stores a
            picture), or a list of such.
        column: For messages.
        folder: That relative paths start from.

    Raises:
        BadRow: there is none, or one that cannot be read.
    """
    if not isinstance(value, list | tuple):
        return (_picture(value, column, folder),)
    if not value:
        raise BadRow(column, "no picture", "is an empty list; a row needs a picture")
    return tuple(_picture(item, f"{column}[{i}]", folder) for i, item in enumerate(value))


def _picture(value: Any, column: str, folder: Path) -> Picture:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        data = bytes(value)
        found = Picture(_digest(data), f"of column {column!r}", None, data)
    elif isinstance(value, str) and value:
        found = _stored(value, column, folder)
    elif hasattr(value, "getpixel"):  # PIL's
        buffer = io.BytesIO()
        value.convert("RGB").save(buffer, "PNG")
        found = Picture(
            _digest(buffer.getvalue()), f"of column {column!r}", None, buffer.getvalue()
        )
    else:
        raise BadRow(
            column, "missing",
            f"must be a picture (a path, bytes, a PIL image), got {kind_of(value)}",
        )  # fmt: skip
    try:
        found.open()
    except Exception as error:  # PIL raises a dozen kinds on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        what = found.where if found.path is not None else "its bytes"
        raise BadRow(
            column, "not a picture", f"{what} cannot be read as a picture: {reason}"
        ) from error
    return found


def _stored(name: str, column: str, folder: Path) -> Picture:
    if _URL.match(name):
        raise BadRow(column, "not a local file", f"is the address {name}; fetch it and give a path")
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadRow(column, "no such file", f"names the file {path}: {reason}") from error
    return Picture(_digest(data), str(path), path)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
