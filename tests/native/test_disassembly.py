"""What the compiler made of the hot loops: read from the built library with objdump.

A loop is the body between a backward jump and its target. The hottest loop of a function is the one
with the most fused multiply-adds.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest

from prefkern.backends import cpu

pytestmark = [
    pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="the native library is not built"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump"),
    pytest.mark.skipif(
        platform.machine().lower() not in ("x86_64", "amd64"), reason="x86-64 instructions"
    ),
]
WIDTH = {"baseline": "%xmm", "avx2": "%ymm", "avx512": "%zmm", "avx512bf16": "%zmm"}


class Instruction(NamedTuple):
    address: int
    text: str


@functools.cache
def functions() -> dict[str, list[Instruction]]:
    """Demangled name -> instructions; every function of the library."""
    done = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", str(cpu.LIBRARY)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in done.stdout.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            body = found.setdefault(head[1], [])
        elif code := re.match(r"\s+([0-9a-f]+):\t(.*)", line):
            body.append(Instruction(int(code[1], 16), code[2]))
    return found


def bodies(isa: str, name: str) -> list[list[Instruction]]:
    """Instructions of the functions of one instruction set whose demangled name contains `name`."""
    marker = f"prefkern::{isa}::{name}"
    return [code for label, code in functions().items() if marker in label.split("(")[0]]


def hottest_loop(body: list[Instruction]) -> list[Instruction]:
    """The loop with most fused multiply-adds; of equals the innermost."""
    best: list[Instruction] = []
    for i, instruction in enumerate(body):
        jump = re.match(r"j[a-z]+\s+([0-9a-f]+) ", instruction.text + " ")
        if jump is None:
            continue
        target = int(jump[1], 16)
        loop = [x for x in body[: i + 1] if x.address >= target]
        if target > instruction.address or not loop:
            continue
        if (-fma_count(loop), len(loop)) < (-fma_count(best), len(best) or 1 << 30):
            best = loop
    return best


def fma_count(code: list[Instruction]) -> int:
    return sum(bool(re.match(r"vfn?m(add|sub)|vdpbf16ps", x.text)) for x in code)


FP32 = "<prefkern::{isa}::Plain<float>, 3"
HOT = [
    ("product_store" + FP32, 24),
    ("product_add" + FP32 + ", false>", 24),
    ("product_add" + FP32 + ", true>", 24),
    ("fold_one<float, false, false>", 7),
    ("fold_one<float, true, false>", 8),
    ("fold_two<float, false, true, false>", 14),
    ("grad_one<float, false, false>", 7),
    ("grad_one<float, true, false>", 8),
    ("grad_two<float, true>", 15),
]


@pytest.mark.parametrize("isa", ["avx512", "avx512bf16"])
@pytest.mark.parametrize(
    ("name", "least"), HOT, ids=[name.split("<prefkern")[0] for name, _ in HOT]
)
def test_hot_loops_are_zmm_fma_without_calls(isa, name, least):
    found = bodies(isa, name.format(isa=isa))
    assert found, f"no function {name} for {isa}: renamed, or inlined where it cannot be found"
    for body in found:
        loop = hottest_loop(body)
        zmm = [x for x in loop if "%zmm" in x.text]
        assert fma_count(zmm) >= least, "\n".join(x.text for x in loop)
        for instruction in loop:
            assert not re.match(r"call|vgather|vscatter", instruction.text), instruction.text
            # a spilled accumulator would be stored to the stack once per turn
            assert not re.search(r"%zmm\d+,-?(0x)?[0-9a-f]*\(%r[sb]p\)", instruction.text), (
                instruction.text
            )


def test_bf16_products_use_the_bf16_instruction():
    for name in ("product_store", "product_add"):
        found = bodies("avx512bf16", f"{name}<prefkern::avx512bf16::Bf16, 3")
        assert found
        for body in found:
            loop = hottest_loop(body)
            assert sum(x.text.startswith("vdpbf16ps") for x in loop) >= 24


@pytest.mark.parametrize("isa", WIDTH)
def test_no_variant_uses_more_than_it_may(isa):
    """No zmm below avx512 and no ymm in the baseline, nor anywhere outside the variants."""
    wider = {"baseline": "%[yz]mm", "avx2": "%zmm|%k[1-7]"}.get(isa)
    if wider is None:
        pytest.skip("the widest registers are its own")
    others = tuple(f"prefkern::{name}::" for name in WIDTH if name != isa)
    for label, body in functions().items():
        if any(other in label for other in others):
            continue
        if isa != "baseline" and f"prefkern::{isa}::" not in label:
            continue
        for instruction in body:
            assert not re.search(wider, instruction.text), f"{label}: {instruction.text}"


@pytest.mark.parametrize("isa", WIDTH)
def test_no_shared_function_carries_a_variant(isa):
    """Weak symbols would be merged across variants, so that a baseline CPU could meet AVX-512: the
    only defined symbols of a variant lie in its own namespace."""
    done = subprocess.run(
        ["nm", "-C", "--defined-only", str(cpu.LIBRARY)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    weak = [x for x in done.stdout.splitlines() if re.match(r"[0-9a-f]+ [WVu] ", x)]
    for line in weak:
        name = line.split(" ", 2)[2]
        for instruction in functions().get(name, []):
            assert not re.search("%[yz]mm", instruction.text), f"{name}: {instruction.text}"
    assert any(f"prefkern::{isa}::table" in x for x in done.stdout.splitlines())
