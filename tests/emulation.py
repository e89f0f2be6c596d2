"""Programs that run CUDA kernels of list_rank and segment_sum block by block on the CPU.

They have the very kernel bodies with their tiling, merge order and barriers, are compiled with
address and undefined-behaviour sanitizers, and fail on shared memory that two threads touch without
a barrier between them. So they check indices, numerics and synchronisation; they are no claim that
a kernel ran on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import FP64
from torch import Tensor

from prefkern.backends.list_options import pack

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
CXX = shutil.which(os.environ.get("CXX", "g++"))
needed = [
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not beside the tests"),
]


class List(NamedTuple):
    family: str
    options: dict
    scores: Tensor
    labels: Tensor
    cu: Tensor
    topk: Tensor | None = None
    reverse: bool = False


class Segments(NamedTuple):
    values: Tensor  # [m, N]
    cu: Tensor
    weights: Tensor | None = None
    d_out: Tensor | None = None  # [m, S]; default ones
    reverse: bool = False


class Program:
    """The emulation; one process runs any number of calls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder: tempfile.TemporaryDirectory | None = None  # kept while the program is

    def run(self, data: bytes) -> bytes:
        # A preloaded library (a profiler, an allocator) would come before the sanitizer's runtime.
        env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        done = subprocess.run([self.path], input=data, capture_output=True, check=False, env=env)
        assert done.returncode == 0, done.stderr.decode()[-4000:]
        return done.stdout

    def calls(self, lines: list[str], inputs: list[list[Tensor]], outputs: list[list[Tensor]]):
        """Runs calls and fills their outputs, tensors of the right shape."""
        data = bytearray()
        for line, tensors in zip(lines, inputs, strict=True):
            data += line.encode() + b"\n"
            for x in tensors:
                data += x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        got, at = self.run(bytes(data)), 0
        for x in itertools.chain.from_iterable(outputs):
            size = x.numel() * x.element_size()
            if size:
                part = torch.frombuffer(bytearray(got[at : at + size]), dtype=x.dtype)
                x.copy_(part.reshape(x.shape))
            at += size
        assert at == len(got)

    def lists(self, cases: list[List]) -> list[tuple[Tensor, Tensor]]:
        lines, inputs, outputs = [], [], []
        for c in cases:
            groups, double = c.cu.numel() - 1, int(c.scores.dtype == FP64)
            lines.append(
                f"call {c.family} {pack(c.family, c.options) or '-'} {double} {groups} "
                f"{c.scores.numel()} {int(c.topk is not None)} {int(c.reverse)}"
            )
            inputs.append([x for x in (c.cu, c.topk, c.scores, c.labels) if x is not None])
            outputs.append([c.scores.new_empty(groups), torch.empty_like(c.scores)])
        self.calls(lines, inputs, outputs)
        return [(loss, slope) for loss, slope in outputs]

    def segments(self, cases: list[Segments]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(out, d_values, d_weights) of every case."""
        lines, inputs, outputs = [], [], []
        for c in cases:
            m, n = c.values.shape
            s, w = c.cu.numel() - 1, c.weights
            kind = 0 if w is None else 2 if w.dtype == FP64 else 1
            double, per_row = int(c.values.dtype == FP64), int(w is not None and w.dim() == 2)
            lines.append(f"call {double} {kind} {per_row} {m} {n} {s} {int(c.reverse)}")
            d_out = torch.ones(m, s, dtype=FP64) if c.d_out is None else c.d_out
            inputs.append([c.cu, c.values, *([] if w is None else [w]), d_out])
            empty = torch.empty(0) if w is None else torch.empty_like(w)
            outputs.append([torch.empty(m, s, dtype=FP64), torch.empty_like(c.values), empty])
        self.calls(lines, inputs, outputs)
        return [(out, d_values, d_weights) for out, d_values, d_weights in outputs]


@functools.cache
def program(name: str, kernels: str) -> Program:
    """tests/cuda/emulate_<name>.cpp with csrc/cuda/<kernels>.cu; built once per process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, name)
    include = Path(torch.__file__).parent / "include"
    build = [
        CXX, "-std=c++20", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        "-Wall", "-Wextra", f"-I{CSRC}", "-isystem", str(include),
        str(HERE / "cuda" / f"emulate_{name}.cpp"),
        "-x", "c++", str(CSRC / "cuda" / f"{kernels}.cu"), "-o", str(path),
    ]  # fmt: skip
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    made = Program(path)
    made.folder = folder
    return made
