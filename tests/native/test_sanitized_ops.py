"""The op tests on the CPU library itself, built with address and undefined-behaviour sanitizers.

`make sanitize`: a copy of the package is built with both and tests/ops run on its kernels; the
headers alone have their own test. Building takes about four minutes of one core, the tests as long
again, so plain `pytest` leaves this file out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CXX = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
)
# Not memory of ours: tests of the allocator, of builds and of other processes.
LEFT_OUT = ("test_memory.py", "test_cpu_isa.py", "test_registration.py")

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not beside the tests"),
]


def runtime(name: str) -> Path:
    """The compiler's sanitizer library."""
    found = subprocess.run(
        [str(CXX), f"-print-file-name={name}"], capture_output=True, text=True, check=False
    )
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"{CXX} has no {name}")
    return path.resolve()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder with the package, its CPU library built with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for name in ("csrc", "prefkern", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    settings = {"CXXFLAGS": FLAGS, "LDFLAGS": FLAGS, "PREFKERN_NO_CUDA": "1"}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(
        build, cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (folder / "kernels").rename(folder / "prefkern" / "kernels")  # as an installation has it
    return folder


FILES = sorted(p.name for p in HERE.parent.joinpath("ops").glob("test_*.py"))


@pytest.mark.parametrize("name", [name for name in FILES if name not in LEFT_OUT])
def test_ops(built, name):
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # the interpreter frees nothing at its end; torch's own pools are not ours to judge
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(built),
    }
    command = [
        sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
        "-k", "not triton and not emulated", str(HERE.parent / "ops" / name),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=built, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    header = f"from {(built / 'prefkern').resolve()}; backends tested: "
    tested = done.stdout.partition(header)[2].splitlines()
    assert tested and "cpu" in tested[0].split(", "), done.stdout[:2000]
    assert " passed" in done.stdout
