"""The C++ headers alone, without torch, under AddressSanitizer and UndefinedBehaviorSanitizer.

check_headers.cpp is compiled once per instruction set this machine can run, half a minute each:
plain pytest takes the narrowest vectors and the widest, `make sanitize` the two between.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = shutil.which(os.environ.get("CXX", "g++"))
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2)
# instruction set -> (compiler flags, the flags of /proc/cpuinfo it needs)
ISAS = {
    "baseline": ((), ()),
    "avx2": (AVX2, ("avx2", "fma", "f16c")),
    "avx512": (AVX512, ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    "avx512bf16": ((*AVX512, "-mavx512bf16"), ("avx512_bf16",)),
}


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((x for x in lines if x.startswith("flags")), "").split())


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
@pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not beside the tests")
@pytest.mark.parametrize(
    "isa",
    [
        pytest.param(x, marks=[pytest.mark.sanitize] if x in ("avx2", "avx512") else [])
        for x in ISAS
    ],
)
def test_headers_under_sanitizers(isa, tmp_path):
    flags, needs = ISAS[isa]
    if flags and platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("an x86-64 instruction set")
    if missing := set(needs) - cpu_flags():
        pytest.skip(f"this machine lacks {', '.join(sorted(missing))}")
    program = tmp_path / "check_headers"
    # -O1: the optimiser still inlines the kernels, the sanitizers still see every access
    build = [
        CXX, "-std=c++20", "-O1", "-g", "-fno-math-errno", "-fno-trapping-math",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi", *flags,
        f"-I{CSRC}", str(HERE / "check_headers.cpp"), "-o", str(program),
    ]  # fmt: skip
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    # A preloaded library (a profiler, an allocator) would come before the sanitizer's runtime.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run([program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr[-4000:]
