"""Benchmarks of prefkern against the products it cannot avoid and against its peers.

Run from the repository root: `python -m benchmarks --help`. See README.md here for how numbers are
made. This package is not installed; `prefkern bench` finds it in a checkout.
"""

import importlib.util
import sys
from pathlib import Path

# `python -m` puts the root on sys.path, where its folder `kernels` would hide the package of that
# name, which transformers looks for. This package is already found; prefkern itself is installed,
# or (a bare tree) comes last.
_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [entry for entry in sys.path if entry and str(Path(entry).resolve()) != _ROOT]
if importlib.util.find_spec("prefkern") is None:
    sys.path.append(_ROOT)
