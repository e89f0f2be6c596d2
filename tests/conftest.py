"""Test-wide setup: Triton's interpreter, uninitialised memory full of NaN, seeds, the backends.

Run from the repository root: `python -m pytest`. The modules of this folder (oracles, closeness,
baseline, cases, op_checks) are imported by plain name.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    # importlib import mode adds no folder to sys.path; the root must stay off it (folder `kernels`)
    sys.path.insert(0, str(HERE))

if not torch.cuda.is_available():
    # a Triton kernel is fixed as compiled or interpreted when its module is imported
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "triton was imported before tests/conftest.py could set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that exports a backend would turn every backend='auto' test into a test of that one.
os.environ.pop("PREFKERN_BACKEND", None)

from cases import PLAIN_PROBLEM, backends_on  # noqa: E402

import prefkern  # noqa: E402

# Hides the folder `kernels` from transformers here too: the process that collects the results of
# test processes imports the class of every warning they send.
import prefkern.integrations  # noqa: E402
from prefkern.backends import choice  # noqa: E402

PACKAGE = str(Path(prefkern.__file__).resolve().parent)
# Few tests each, but they start processes or a compiler: first, so that no test process is left
# alone with one of them at the end.
LONG_FILES = (
    "test_packaging.py", "train/test_ddp.py", "train/test_sharded", "train/test_failing_ranks.py",
    "train/test_precompute_shared.py", "integrations/test_zero_training.py", "distributed/",
    "integrations/test_head_distributed.py", "integrations/test_preference_model.py",
    "benchmarks/test_heads.py", "train/test_waiting.py", "test_examples.py", "examples/",
    "train/test_demo.py", "train/test_resume.py", "test_docs.py", "kernels/", "cuda/",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        # A file whose op some backend lacks names it: OP = "error_sum".
        metafunc.parametrize("backend", backends_on(getattr(metafunc.module, "OP", "linear_logps")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(HERE).as_posix()
        return next((i for i, name in enumerate(LONG_FILES) if path.startswith(name)), 99)

    items.sort(key=place)


def pytest_report_header() -> list[str]:
    on = ", ".join(backends_on())
    lines = [f"prefkern {prefkern.__version__} from {PACKAGE}; backends tested: {on}"]
    for name in choice.backend_names():
        if reasons := choice.unsupported(name, PLAIN_PROBLEM):
            lines.append(f"  {name} is off: {'; '.join(reasons)}")
    return lines


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
    np.random.seed(1234)


def _poison(tensor):
    """Fills memory that the caller has promised to write: NaN, or a value no result has."""
    if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
        if tensor.dtype.is_floating_point:
            tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.int32, torch.int64):
            tensor.fill_(-(2**30) - 7)
    return tensor


def _from_package(depth: int) -> bool:
    return sys._getframe(depth).f_code.co_filename.startswith(PACKAGE)


@pytest.fixture(autouse=True, scope="session")
def _nan_memory():
    """torch.empty, empty_like, empty_strided and new_empty called from the package give NaN.

    An element that a kernel forgets to write then fails at once instead of being 0 by luck. Memory
    that native code allocates for itself is out of reach here.
    """
    functions = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    method = torch.Tensor.new_empty

    def wrap(original):
        def empty(*args, **kwargs):
            out = original(*args, **kwargs)
            # while tracing, frames cannot be inspected and nothing is read
            if torch.compiler.is_compiling() or not _from_package(2):
                return out
            return _poison(out)

        return empty

    for name, original in functions.items():
        setattr(torch, name, wrap(original))
    torch.Tensor.new_empty = wrap(method)
    yield
    for name, original in functions.items():
        setattr(torch, name, original)
    torch.Tensor.new_empty = method


@pytest.fixture
def one_thread():
    """Runs the test on one thread and restores the count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_backend(backend):
    """For a file whose tests all run on every backend: pytest.mark.usefixtures("on_backend")."""
    with prefkern.use_backend(backend):
        yield


@pytest.fixture
def fresh_backend_module():
    """Registers a module as a backend for one test: fresh_backend_module(module, name)."""
    added: list[str] = []
    saved_rows, saved_priority = dict(choice._ROWS), choice.PRIORITY

    def register(module, name: str = "planted") -> str:
        sys.modules[module.__name__] = module
        added.append(module.__name__)
        choice._ROWS[name] = (module.__name__, "registered by a test")
        choice.PRIORITY = (*choice.PRIORITY, name)
        return name

    yield register
    choice._ROWS.clear()
    choice._ROWS.update(saved_rows)
    choice.PRIORITY = saved_priority
    for name in added:
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
