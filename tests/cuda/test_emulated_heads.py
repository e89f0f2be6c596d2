"""The head ops of the `cuda` backend in emulation: the whole backend but the GPU.

All of csrc/cuda is compiled with address and undefined-behaviour sanitizers, launches replaced by
loops over blocks and threads (csrc/cuda/block.h), and loaded in a process of its own (tests/
emulated_cuda.py), where the op tests and the tile tests of emulated_tiles.py run on it. That checks
indexing, numerics, merge order and barriers. It is no claim that a kernel ran on a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc/cuda"
CXX = shutil.which(os.environ.get("CXX", "g++"))
SANITIZERS = "-fsanitize=address,undefined"
pytestmark = [
    pytest.mark.slow,  # 75 seconds of one core, a third of it the compiler
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
    pytest.mark.skipif(not CUDA.is_dir(), reason="the sources are not beside the tests"),
]
# What the kernels themselves decide: not the choice of a backend, and not the bits of torch's CPU
# products for different numbers of threads.
OP_TESTS = (
    "linear_logps", "linear_divergence", "logits_logps", "expected_value", "record",
    "record_dtypes", "tail_mass", "near_reference",
)  # fmt: skip
CHOICE = (
    "cuda and not float64 and not thread_count and not several_N"
    " and not (near_reference and (float16 or float32))"  # 16 bits are where rounding decides
)


def compiler_runs(*command: str) -> str:
    done = subprocess.run([CXX, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The ops and kernels without optimisation: a tenth of the compile time, and the same code."""
    folder = tmp_path_factory.mktemp("emulated")
    torch_folder = Path(torch.__file__).parent
    flags = [
        *("-std=c++20", "-O0", SANITIZERS, "-fPIC", "-fvisibility=hidden", "-DPREFKERN_EMULATED"),
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(f"-I{ROOT / 'csrc'}", "-isystem", str(torch_folder / "include")),
    ]

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.name}.o")
        compiler_runs("-x", "c++", *flags, "-c", str(source), "-o", made)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")]))
    link = ["-shared", SANITIZERS, *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    compiler_runs(*link, "-o", str(folder / "emulated.so"))
    return folder / "emulated.so"


def test_op_tests_on_emulated_kernels(library):
    # libstdc++ too: the sanitizer looks for the function that throws when it starts
    names = ("libasan.so", "libstdc++.so")
    runtime = " ".join(compiler_runs(f"-print-file-name={name}").strip() for name in names)
    tests = [ROOT / "tests/cuda/emulated_tiles.py"]
    tests += [ROOT / f"tests/ops/test_{name}.py" for name in OP_TESTS]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "emulated_cuda", "-p", "no:cacheprovider"),
            # a sanitizer writes to the descriptor itself and ends the process
            *("-q", "--tb=short", "--capture=sys", "-k", CHOICE, *map(str, tests)),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "EMULATED_CUDA": str(library),
            "PYTHONPATH": str(ROOT / "tests"),
            "LD_PRELOAD": runtime,
            # what Python itself never frees is not ours to find
            "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    text = (done.stdout + done.stderr)[-6000:]
    assert done.returncode == 0, text
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 250, text
