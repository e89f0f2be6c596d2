"""The native kernels of every instruction set this machine has, forced by PREFKERN_CPU_ISA.

The set is fixed when the library loads, so each runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import backends_on

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
FLAGS = {
    "baseline": (),
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f",),
    "avx512bf16": ("avx512_bf16",),
}
CODE = """
import sys
sys.path.insert(0, {tests!r})
import torch
from cases import DTYPES, ONE_MODEL, OPTIONS, TWO_MODEL, Regime, make_inputs
from op_checks import check_closeness, check_masked_rows, inputs_of
from prefkern.backends import cpu
assert cpu.isa() == {isa!r}, cpu.isa()
for dtype in DTYPES:
    wide = Regime("wide", N=3, V=3001, D=8)
    for regime in (wide, Regime("ragged", N=37, V=131, D=29)):
        inputs = inputs_of("linear_logps", regime, dtype)
        check_closeness("cpu", inputs, ("logp", "lse", "zy", "top1"))
    check_masked_rows("cpu", inputs_of("linear_logps", regime, dtype), ("logp",), float("nan"))
for dtype in (torch.float32, torch.float64):
    for option in OPTIONS:
        inputs = make_inputs(Regime("ragged", N=37, V=131, D=29), dtype, option=option)
        check_closeness("cpu", inputs, TWO_MODEL, option=option)
        check_closeness("cpu", inputs, ("logp", "fkl"), option=option, wanted=("hidden",))
    check_closeness("cpu", inputs_of("linear_logps", regime, dtype), ONE_MODEL)
print("ok")
"""


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    line = next((x for x in info.read_text().splitlines() if x.startswith("flags")), "")
    return set(line.split())


@pytest.mark.skipif("cpu" not in backends_on(), reason="the native backend is off")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_as_close(isa):
    if missing := [flag for flag in FLAGS[isa] if flag not in cpu_flags()]:
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    code = CODE.format(tests=str(Path(__file__).resolve().parents[1]), isa=isa)
    environment = {**os.environ, "PREFKERN_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "ok"


@pytest.mark.skipif("cpu" not in backends_on(), reason="the native backend is off")
@pytest.mark.parametrize("choice", ["cpu", "auto"])
def test_an_unknown_instruction_set_is_refused(choice):
    """By automatic choice too, which would otherwise land on full logits in silence."""
    code = (
        "import prefkern, torch\n"
        "a = (torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))\n"
        f"prefkern.linear_logps(*a, backend={choice!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PREFKERN_CPU_ISA": "sse9"},
        check=False,
    )
    assert done.returncode != 0 and "sse9" in done.stderr and "baseline" in done.stderr, done.stderr
