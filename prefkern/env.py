"""Every environment variable prefkern reads, in one place.

Each is read at call time, so tests and notebooks may set it after the import.
"""

from __future__ import annotations

import os

VARIABLES: dict[str, str] = {
    "PREFKERN_BACKEND": "backend for backend='auto': reference, cpu, triton, cuda (default: automatic)",
    "PREFKERN_NO_EXT": "1: build and import without the compiled extension",
    "PREFKERN_NO_CUDA": "1: build without the CUDA library and do not load it",
    "PREFKERN_CUDA_ARCHS": "architectures to build CUDA kernels for, e.g. '80;90a;100'",
    "PREFKERN_CPU_ISA": "CPU kernels: baseline, avx2, avx512 or avx512bf16 (default: the best there is)",
    "PREFKERN_AUTOTUNE": "1: tune Triton tiles at first use and print the line for the table",
    "PREFKERN_DEBUG_SYNC": "1: synchronise after every CUDA kernel, so that errors name their call",
}


def get(name: str) -> str | None:
    """The value of a declared variable, None when unset or empty."""
    if name not in VARIABLES:
        raise AssertionError(f"{name} is not declared in prefkern.env.VARIABLES")
    return os.environ.get(name) or None


def flag(name: str) -> bool:
    """True when a declared variable is set to something other than 0."""
    return get(name) not in (None, "0")
