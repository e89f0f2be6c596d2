"""These tests are of Triton kernels: without triton (it has no wheels outside Linux) there is
nothing to collect, and the report's header says that the backend is off."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
