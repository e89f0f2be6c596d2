"""How the tables of planted faults are written where one file has many."""

from __future__ import annotations

Row = tuple[str, ...]  # name, file, text as it stands, text with the fault, tests ...

TRAIN, TESTS = "prefkern/train/", "tests/train/"


def of(file: str, tests: str, *faults: tuple[str, str]) -> list[Row]:
    """Rows of one file that the same tests see, named after the file and the change."""
    place = file.removeprefix("prefkern/")
    return [(f"{place}: {old} -> {new}", file, old, new, *tests.split()) for old, new in faults]
