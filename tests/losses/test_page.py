"""docs/losses.md is what the code says, and says enough of every loss."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from prefkern import losses
from prefkern.cli import main as cli
from prefkern.losses import page

PAGE = page.page()
FILE = Path(__file__).resolve().parents[2] / "docs" / "losses.md"


def test_the_committed_page_is_current(capsys):
    assert cli.main(["losses", "--markdown"]) == 0
    made = capsys.readouterr().out
    assert made == PAGE
    if made != FILE.read_text(encoding="utf-8"):
        pytest.fail("docs/losses.md is old; run: prefkern losses --markdown > docs/losses.md")


def test_the_contents_lead_somewhere():
    titles = re.findall(r"^##+ (.*)$", PAGE, re.M)
    anchors = {page._anchor(title) for title in titles}
    assert len(anchors) == len(titles)
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
    assert set(losses.LOSSES) <= set(titles)
    assert PAGE.isascii() and not re.search(r"[ \t]$", PAGE, re.M)
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 4) for row in rows)  # no cell is cut


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_has_its_formula_and_the_meaning_of_every_argument(name):
    record = losses.LOSSES[name]
    document = page.read(inspect.getdoc(record.fn))
    assert document.summary.endswith(".") and "l" in document.formula
    assert not any(line.startswith("Args") for line in document.notes)
    entry = PAGE.split(f"### {name}\n")[1].split("\n### ")[0]
    for argument in losses.arguments(record):
        if argument != "backend":
            row = re.search(rf"^\| `{argument}` \| (\S.*) \| (\S.*) \|$", entry, re.M)
            assert row, f"{argument} has no meaning"
    assert record.source.split(",")[0].split(" eq")[0].removeprefix("arXiv ")[:9] in entry
