"""Blocks of README and docs that need another library, where it is installed."""

from __future__ import annotations

import pytest
from doc_blocks import ROOT, blocks, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDY = [page for page in PAGES if any(block.needs for block in blocks(page))]


@pytest.mark.parametrize("page", NEEDY, ids=lambda page: page.name)
def test_the_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if not any(block.needs for block in run(page)):
        pytest.skip("none of the libraries is installed")
    capsys.readouterr()


def test_every_library_of_this_environment_has_a_block():
    needs = {name for page in NEEDY for block in blocks(page) for name in block.needs}
    assert {"trl", "liger_kernel", "transformers"} <= needs
