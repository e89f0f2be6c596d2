"""The blocks of the README run as printed, one after the other in one session."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_blocks_of_the_readme_run(capsys):
    text = README.read_text(encoding="utf-8")
    blocks = [(text[: m.start()].count("\n") + 2, m[1]) for m in BLOCK.finditer(text)]
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for line, block in blocks:
        if "integrations.trl" in block and importlib.util.find_spec("trl") is None:
            continue
        try:
            exec(compile("\n" * (line - 1) + block, str(README), "exec"), names)
        except Exception as error:
            pytest.fail(f"README.md, block at line {line}: {type(error).__name__}: {error}")
    loss, rewards = map(float, capsys.readouterr().out.split())
    assert 0.0 < loss < 50.0 and 0.0 <= rewards <= 1.0
