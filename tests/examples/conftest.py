"""The modules of examples/ for the tests here, which run on one thread and print nothing."""

from __future__ import annotations

import pytest
from example_files import example_files


@pytest.fixture(scope="module")
def example():
    """example(name): the module, its starting model shared with the others of a file."""
    pytest.importorskip("transformers")
    with example_files(one_start=True) as load:
        yield load


@pytest.fixture(autouse=True)
def quiet(capsys, one_thread):
    yield
    capsys.readouterr()
