"""The rows of the tables follow the code. `make mutants` plants each; this only finds it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def mutants():
    sys.path.insert(0, str(HERE))  # the tables import `rows` from there
    try:
        spec = importlib.util.spec_from_file_location("mutants", HERE / "mutants.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["mutants"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(HERE))
        sys.modules.pop("mutants", None)


def test_every_row_stands_in_the_code_once_and_names_tests_that_exist(mutants):
    root, stale = mutants.ROOT, []
    for row in mutants.table():
        text = (root / row.file).read_text(encoding="utf-8")
        if text.count(row.old) != 1 or row.old == row.new:
            stale.append(f"{row.name}: its text stands there {text.count(row.old)} times")
            continue
        try:
            compile(text.replace(row.old, row.new), row.file, "exec")
        except SyntaxError as error:
            stale.append(f"{row.name}: {error}")
        stale += [
            f"{row.name}: no {test}"
            for test in row.tests
            if not (root / test.partition("::")[0]).exists()
        ]
    assert not stale, "\n".join(stale)
