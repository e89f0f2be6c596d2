"""The CUDA library of this checkout: the installed one, else built once where nvcc is.

Where torch has no CUDA, setup.py leaves the library out; the tests that read its machine code build
it for the default GPUs. It is kept in build/, under a name made of its sources.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from prefkern.backends import cuda

ROOT = Path(__file__).resolve().parents[1]
# setup.py with one of its extensions: the CPU kernels take as long again
BUILD = """
import runpy, setuptools, sys
everything = setuptools.setup
def cuda_alone(*, ext_modules, **given):
    everything(ext_modules=[e for e in ext_modules if e.name.endswith("_ops_cuda")], **given)
setuptools.setup = cuda_alone
runpy.run_path("setup.py", run_name="__main__")
"""
NO_NVCC = "_ops_cuda.so is not there and nvcc to build it is not either"


@functools.cache
def cuda_library() -> Path | None:
    """Path of the library; None where it is not installed and nvcc is missing.

    Raises:
        RuntimeError: nvcc is there and the build fails.
    """
    if cuda.LIBRARY.exists():
        return cuda.LIBRARY
    if shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin") is None:
        return None
    digest = hashlib.sha256()
    for file in sorted([*ROOT.glob("csrc/**/*"), ROOT / "setup.py"]):
        if file.is_file():
            digest.update(file.read_bytes())
    folder = ROOT / "build" / f"cuda-{digest.hexdigest()[:16]}"
    library = folder / "prefkern/_ops_cuda.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several test processes may ask
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            environment = {k: v for k, v in os.environ.items() if k != "PREFKERN_NO_CUDA"}
            done = subprocess.run(
                [sys.executable, "-c", BUILD, "-q", "build_ext", "--build-lib", str(folder)],
                cwd=ROOT,
                env=environment | {"PREFKERN_CUDA_ARCHS": "sm_80,sm_90a,sm_100"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0 or not library.exists():
                raise RuntimeError(f"the CUDA library does not build:\n{done.stderr[-3000:]}")
    return library
