"""No golden entry is unused: what the tests are parametrised with, against what the files hold.

A test of golden vectors that reads entries by name, not by parametrisation, is listed in BY_NAME.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import vectors

HERE = Path(__file__).resolve().parent
FILES = {
    "pair": ["test_pair_golden.py"],
    "list": ["test_list_golden.py", "test_diffusion_golden.py", "../test_metrics.py"],
    "token": ["test_token_golden.py", "test_token_catalogue.py", "../ops/test_golden_stats.py"],
}
BY_NAME = {
    "token": {
        "sparsepo_mask_module": "test_token_golden.test_mask_module",
        "d2o": "test_token_numbers.test_d2o_has_two_references",
    }
}
# Parts of list.json that are not lists of cases, and the file that reads each.
PARTS = {"group_advantages": "test_policy_losses.py", "metrics": "../test_metrics.py"}


def parameters(file: str) -> list[object]:
    """Every value that a test of the file is parametrised with."""
    path = (HERE / file).resolve()
    spec = importlib.util.spec_from_file_location(f"golden_of_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[object] = []
    for test in vars(module).values():
        for mark in getattr(test, "pytestmark", []) if callable(test) else []:
            if mark.name != "parametrize":
                continue
            for entry in mark.args[1]:
                values = getattr(entry, "values", entry)
                if callable(values):  # dict.values: the entry is a case
                    values = entry
                found += list(values) if isinstance(values, (list, tuple)) else [values]
    return found


def key(case: dict) -> str:
    return json.dumps(case, sort_keys=True)


@pytest.mark.parametrize("name", FILES)
def test_every_entry_is_used(name):
    data = vectors.load(name)
    used = [value for file in FILES[name] for value in parameters(file)]
    cases = {key(value) for value in used if isinstance(value, dict)}
    names = {value for value in used if isinstance(value, str)}
    wanted = data["list_cases"] + data["diffusion"]["cases"] if name == "list" else data["cases"]
    unused = [
        c.get("id") or key(c)[:200]
        for c in wanted
        if key(c) not in cases and c.get("id") not in names | set(BY_NAME.get(name, {}))
    ]
    assert not unused


def test_every_part_of_the_list_file_is_read():
    data = vectors.load("list")
    known = {"about", "score", "datasets", "list_cases", "diffusion", *PARTS}
    assert set(data) == known
    for part, file in PARTS.items():
        assert f'"{part}"' in (HERE / file).read_text(encoding="utf-8")
    assert {c["dataset"] for c in data["list_cases"]} == set(data["datasets"])
    assert {c["input"] for c in data["diffusion"]["cases"]} == set(data["diffusion"]["inputs"])
