"""Thin adapters to other libraries; each module imports its library only when used."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def hide_source_folder() -> None:
    """Marks `kernels` as not importable when the name finds this repository's own folder.

    With the repository root on sys.path (python -m prefkern, python -m pytest) transformers takes
    the folder for the package `kernels` and fails while it imports it; None in sys.modules is how
    Python spells "not installed".
    """
    if "kernels" in sys.modules:
        return
    spec = find_spec("kernels")
    own = Path(__file__).resolve().parents[2] / "kernels" / "__init__.py"
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == own:
        sys.modules["kernels"] = None  # type: ignore[assignment]


hide_source_folder()
