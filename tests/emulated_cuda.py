"""pytest plugin: the `cuda` backend on CPU tensors, its kernels emulated block by block.

    EMULATED_CUDA=library.so python -m pytest -p emulated_cuda tests/ops -k cuda

The library holds the ops of csrc/cuda with the launches replaced by loops; tests/cuda/
test_emulated_heads.py builds it and starts this. So everything but the GPU takes part: the driver,
the op registration, the kernels' indexing, tiling, merge order and barriers. It is no claim that a
kernel ran on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from prefkern.backends import cuda
from prefkern.backends.contract import Problem


def unsupported(problem: Problem) -> list[str]:
    """As on a GPU, with cpu in its place."""
    elsewhere = [] if problem.device == "cpu" else ["the emulation runs on cpu tensors"]
    return cuda.unfit(problem) + elsewhere


torch.ops.load_library(os.environ["EMULATED_CUDA"])
cuda.unsupported = unsupported


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test of float64, which these kernels refuse with a reason, is skipped with that reason."""
    try:
        return (yield)
    except ValueError as error:
        reasons = [x for x in str(error).splitlines() if x.startswith("  cuda: ")]
        if reasons and "got torch.float64" in reasons[0]:
            pytest.skip(reasons[0].strip())
        raise
