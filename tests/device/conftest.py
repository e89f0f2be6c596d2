"""A GPU for the tests of this folder, one oracle for all backends, and what each test launched."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import bench_package  # noqa: F401
import cases
import op_checks
import pytest
import torch

from benchmarks import inside


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launches", metavar="FILE", help="append a JSON line a test to FILE")
    parser.addoption(
        "--stand-in", action="store_true",
        help="without a GPU: Triton's interpreter on CPU tensors, for what needs no GPU's features",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`gpu`: every backend with kernels of its own that serves this machine's GPU."""
    if "gpu" in metafunc.fixturenames:
        found = cases.gpu_backends()
        if metafunc.config.getoption("stand_in", False):
            found = found or tuple({"triton"}.intersection(cases.backends_on()))
        skip = pytest.mark.skip(reason="needs a GPU that prefkern's kernels serve")
        metafunc.parametrize("gpu", found or [pytest.param("none", marks=skip)])


@pytest.fixture
def device(gpu: str) -> str:
    """Where the tensors of a test live."""
    return cases.device_of(gpu)


@pytest.fixture
def features(device: str) -> None:
    """For tests of what only a GPU has: streams, graphs, its memory."""
    if device == "cpu":
        pytest.skip("Triton's interpreter has no streams and no graphs")


# ---- one oracle for all backends -----------------------------------------------------------------
def _digest(x: object) -> object:
    """Of an argument: inputs by their bits, all else by its words."""
    if isinstance(x, torch.Tensor):
        return hashlib.sha256(x.detach().contiguous().view(torch.uint8).numpy().tobytes()).digest()
    if isinstance(x, cases.Inputs):
        return tuple(_digest(value) for value in vars(x).values())
    return repr(x) if not isinstance(x, dict) else tuple(x)


def _remembered(function):
    found: dict[object, object] = {}

    @functools.wraps(function)
    def call(*arguments):
        key = tuple(_digest(x) for x in arguments)
        if key not in found:
            found[key] = function(*arguments)
        return found[key]

    return call


@pytest.fixture(autouse=True, scope="module")
def _one_oracle():
    """The oracle of a call takes seconds and does not depend on the backend; tests that share one
    stay in one process (groups below)."""
    before = op_checks.run_oracle, op_checks.run_baseline
    op_checks.run_oracle, op_checks.run_baseline = map(_remembered, before)
    yield
    op_checks.run_oracle, op_checks.run_baseline = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        if Path(__file__).parent not in item.path.parents:
            continue
        if callspec and not item.get_closest_marker("xdist_group"):
            others = "-".join(str(v) for k, v in callspec.params.items() if k != "gpu")
            item.add_marker(pytest.mark.xdist_group(f"{item.originalname} {others}"))


# ---- what a test launched ------------------------------------------------------------------------
_BEFORE = pytest.StashKey[dict]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    file = item.config.getoption("launches", None)
    if file and call.when in ("setup", "call"):
        now = {name: inside.launched(name) for name in ("triton", "cuda")}
        before = item.stash.setdefault(_BEFORE, now)
        if call.when == "call":
            line = {
                "key": [item.nodeid], "status": "ok" if report.passed else report.outcome,
                "launched": inside.newly_launched(before, now),
            }  # fmt: skip
            with Path(file).open("a") as lines:
                lines.write(json.dumps(line) + "\n")
    return report
