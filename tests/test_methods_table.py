"""docs/methods.md: one line per system, and every name in it exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from prefkern import LOSSES, losses

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
LOSS = re.compile(r"losses\.(\w+)(?:\((\w+(?:, \w+)*)\))?")


def table() -> list[tuple[str, str, str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]
    assert all(len(row) == 3 for row in rows)
    return rows  # type: ignore[return-value]


ROWS = table()


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def imported(path: str) -> Any:
    """The object of a dotted path: the longest importable module, then attributes."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def test_one_line_per_system():
    assert len(ROWS) == 87
    systems = [system.casefold() for system, _, _ in ROWS]
    assert systems == sorted(systems) and len(set(systems)) == 87
    ids = [paper for _, paper, _ in ROWS]
    assert len(set(ids)) == 87 and all(re.fullmatch(r"2\d{3}\.\d{5}", paper) for paper in ids)


@pytest.mark.parametrize(("system", "text"), [(row[0], row[2]) for row in ROWS])
def test_what_the_line_names_exists(system, text):
    found = names(text)
    # A line names something, or says that nothing is there or that nothing needs to be.
    assert found or text.startswith(("not yet: ", "nothing to run: ")), system
    for name in found:
        if match := LOSS.fullmatch(name):
            record = LOSSES[match[1]]
            if match[2]:
                assert set(match[2].split(", ")) <= set(losses.arguments(record)), name
        else:
            if name.startswith("examples/"):
                assert (PAGE.parents[1] / name).is_file(), name
                continue
            assert name.startswith("prefkern."), f"{name} is neither losses.<name> nor prefkern.<x>"
            imported(name)


@pytest.mark.parametrize(("system", "text"), [(row[0], row[2]) for row in ROWS])
def test_a_provisional_loss_is_called_so(system, text):
    """A line whose losses are all provisional says it; one that has a verified loss does not."""
    records = [LOSSES[match[1]] for name in names(text) if (match := LOSS.fullmatch(name))]
    if records and not text.startswith(("not yet", "nothing")):
        provisional = all(record.status.startswith("provisional") for record in records)
        assert provisional == ("provisional" in text), system
