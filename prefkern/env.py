"""Every environment variable prefkern reads, in one place.

Each is read at call time, so tests and notebooks may set it after the import.
"""

from __future__ import annotations

import os

VARIABLES: dict[str, str] = {
    "PREFKERN_BACKEND": (
        "backend where backend='auto': cpu, triton, cuda or eager (default: automatic)"
    ),
    "PREFKERN_NO_EXT": "1: build and run without the compiled extension",
    "PREFKERN_AUTOTUNE": "1: time the Triton tile candidates on first use and print the winner",
    "PREFKERN_NO_CUDA": "1: build and run without the CUDA library",
    "PREFKERN_CUDA_ARCHS": "GPUs to build for, newest also as PTX (default: sm_80,sm_90a,sm_100)",
    "PREFKERN_DEBUG_SYNC": "1: wait for every CUDA kernel, so that an error names its own",
    "PREFKERN_CPU_ISA": "CPU kernels: baseline, avx2, avx512 or avx512bf16 (default: the best)",
}


def get(name: str) -> str | None:
    """The value of a declared variable, None when unset or empty."""
    if name not in VARIABLES:
        raise AssertionError(f"{name} is not declared in prefkern.env.VARIABLES")
    return os.environ.get(name) or None


def flag(name: str) -> bool:
    """True when a declared variable is set to something other than 0."""
    return get(name) not in (None, "0")
