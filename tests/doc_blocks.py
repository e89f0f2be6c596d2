"""The Python blocks of a Markdown page, run as printed, one after the other in one session.

A comment before a block, `<!-- needs: trl ... -->`, names packages and may hold what the reader
already has (a model, a data set); without the packages the block is skipped.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[\w, ]+)(?P<before>\n.*?)? ?-->\n+)?^```python\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int
    needs: tuple[str, ...]
    before: str
    code: str

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        needs = tuple((match["needs"] or "").replace(",", " ").split())
        line = text[: match.start("code")].count("\n") + 1
        found.append(Block(line, needs, match["before"] or "", match["code"]))
    return found


def run(page: Path) -> list[Block]:
    """Runs a page; returns the blocks that ran.

    Raises:
        AssertionError: a block failed, with its line.
    """
    names: dict[str, object] = {}
    ran = []
    for block in blocks(page):
        if block.missing:
            continue
        try:
            exec(block.before, names)
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
        except Exception as error:
            where = f"{page.name}, block at line {block.line}"
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        ran.append(block)
    if "accelerate" in sys.modules:  # a block's trainer leaves its precision to the whole process
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    return ran
