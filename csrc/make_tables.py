"""Writes csrc/numerics/tables.h: the names of prefkern/backends/tables.py and prefkern/stats.py as
C++ enumerations, so that native code takes positions from the same place as Python.

    python csrc/make_tables.py          writes the header
    python csrc/make_tables.py --check  exits with 1 where it is not current
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "csrc/numerics/tables.h"
# C++ name->the tuples of names whose order it takes
ENUMS = {
    "Stat": ("ONE_MODEL_STATS", "TWO_MODEL_STATS"),
    "Field": ("FIELDS",),
    "At": ("AT",),
    "Second": ("SECOND",),
    "Norm": ("NORMS",),
    "Saved": ("SAVED",),
    "Coef": ("COEFFICIENTS",),
    "Factor": ("FACTORS",),
    "Maximum": ("MAXIMA",),
    "Move": ("SHIFT",),
    "Input": ("TENSORS",),
    "Number": ("NUMBERS",),
}
NAMED = ("Stat", "Factor", "Input")  # those that native code reads as text
CONSTANTS = ("SMALL_ONE_MODEL", "SMALL_TWO_MODEL", "SAVED_ONE_MODEL", "CHUNK")


def literals(path: Path) -> dict[str, object]:
    """The literal assignments at the top of a file, without importing it."""
    found: dict[str, object] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def header() -> str:
    tables = literals(ROOT / "prefkern/stats.py") | literals(ROOT / "prefkern/backends/tables.py")
    lines = [
        "// Written by csrc/make_tables.py from prefkern/stats.py and prefkern/backends/tables.py,",
        "// which say what each name is. Do not edit.",
        "// clang-format off",
        "#pragma once",
        "",
        "namespace prefkern {",
        "",
    ]
    for name, sources in ENUMS.items():
        words = [word for source in sources for word in tables[source]]  # type: ignore[attr-defined]
        lines += [f"enum class {name} : int {{", *(f"  {word}," for word in words), "};"]
        lines += [f"constexpr int k{name}s = {len(words)};"]
        if name in NAMED:
            lines += [f"constexpr const char* k{name}Names[k{name}s] = {{"]
            lines += [*(f'  "{word}",' for word in words), "};"]
        lines += [""]
    for name in CONSTANTS:
        words = "".join(part.title() for part in name.split("_"))
        lines += [f"constexpr int k{words} = {tables[name]};"]
    return "\n".join([*lines, "", "}  // namespace prefkern", ""])


if __name__ == "__main__":
    text = header()
    if "--check" in sys.argv:
        sys.exit(HEADER.read_text() != text)
    HEADER.write_text(text)
