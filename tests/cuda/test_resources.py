"""What the compiled CUDA library is made of, read with cuobjdump: no GPU takes part.

Registers, stack and shared memory of every kernel for every GPU it was built for, spills and local
memory (none in a kernel that touches every logit), the width of its loads, the list of GPUs, the
size. The table is committed as benchmarks/results/cuda_resources.csv; write it again with

    PYTHONPATH=tests python tests/cuda/test_resources.py
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_hot_path import MOST, Work, instructions, listings
from cuda_library import NO_NVCC, cuda_library

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks/results/cuda_resources.csv"
COUNTS = TABLE.with_name("counts.csv")
ARCHS = ("sm_80", "sm_90a", "sm_100")
# Kernels of the head ops, of sums and of lists.
HOT = re.compile(
    r"((Frozen)?Fold|SecondSweep|Gradient|FrozenFactor|RaiseRows|(Merge|Norm|Finish|Pull)Rows|Segment\w+|"
    r"ListKernel)\b"
)
TILE = re.compile(r"((?:Frozen)?Fold|SecondSweep|Gradient|FrozenFactor)<(.*)>")
SIZE_LIMIT = 10 << 20


def cuobjdump() -> str | None:
    """From the CUDA toolkit, else from triton's wheel."""
    if found := shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(inside) if inside.exists() else None


pytestmark = pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump (CUDA toolkit or triton)")


@pytest.fixture(autouse=True, scope="module")
def _library():
    if cuda_library() is None:
        pytest.skip(NO_NVCC)


@functools.cache
def dump(*flags: str) -> str:
    tool = cuobjdump()
    assert tool is not None
    command = [tool, *flags, str(cuda_library())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Use(NamedTuple):
    registers: int
    stack: int
    shared: int
    local: int


def kernel_name(mangled: str) -> str:
    """_ZN8prefkern10run_kernelINS_4FoldIfLb0ELb1EEEEEvNT_4ArgsE -> Fold<float, false, true>."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    found = re.search(r"run_kernel<(.*)>\(", text)
    return (found[1] if found else text).replace("prefkern::", "").replace(" >", ">").strip()


@functools.cache
def resources() -> dict[tuple[str, str], Use]:
    """(kernel, GPU) -> what it uses."""
    found, arch, kernel = {}, "", ""
    usage = dump("-res-usage")
    names = {x: kernel_name(x) for x in set(re.findall(r"_ZN8prefkern\w+", usage))}
    for line in usage.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = names.get(match[1], match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            found[kernel, arch] = Use(*map(int, match.groups()))
    return found


def table() -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("kernel", "gpu", "registers", "stack_bytes", "shared_bytes", "local_bytes"))
    writer.writerows((*key, *use) for key, use in sorted(resources().items()))
    return out.getvalue()


def test_every_kernel_is_there_for_every_gpu():
    archs = defaultdict(set)
    for kernel, arch in resources():
        archs[kernel].add(arch)
    assert len(archs) == 44, sorted(archs)
    assert {k: sorted(a) for k, a in archs.items() if a != set(ARCHS)} == {}


def test_ptx_of_the_newest_alone():
    assert set(re.findall(r"\.(sm_\w+)\.ptx", dump("-lptx"))) == {ARCHS[-1]}


def test_hot_kernels_neither_spill_nor_use_local_memory():
    bad = {k: u for k, u in resources().items() if HOT.match(k[0]) and (u.stack or u.local)}
    assert bad == {}


def test_registers_and_shared_memory_leave_room_for_several_blocks():
    """A block of 128 threads with 128 registers fills a quarter of a multiprocessor."""
    hot = {k: u for k, u in resources().items() if TILE.match(k[0])}
    # folds and gradients: one model in 3 dtypes and 2 of them small, two models in 3 and 1; the
    # second sweep and the factors in 3; the fold of a frozen head in 4 of the first
    assert len(hot) == len(ARCHS) * (2 * (5 + 4) + 2 * 3 + 4)
    assert {k: u for k, u in hot.items() if u.registers > 128 or u.shared > 4096} == {}


def test_size():
    library = cuda_library()
    assert library is not None and library.stat().st_size <= SIZE_LIMIT


def test_tiles_are_read_16_bytes_at_a_time():
    """For each model one 16-byte load in the loop over whole packets, one or two before it and one
    in the loop over other packets; narrower loads of tiles belong to the row's ends."""
    loads: dict[str, list[str]] = defaultdict(list)
    kernel = ""
    for line in dump("-sass", "-arch", "sm_90a").splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            kernel = match[1]
        elif match := re.search(r"\b(LDG\S*\.128|LDL\S*|STL\S*|ATOM\S*|RED\.\S*)", line):
            loads[kernel].append(match[1])
    loads = {kernel_name(k): v for k, v in loads.items()}
    models = {"SecondSweep": 2, "FrozenFactor": 2}
    checked = 0
    for kernel, found in loads.items():
        if not (match := TILE.match(kernel)):
            continue
        two = ", true, " in kernel
        third = kernel.endswith("<float, true, false>")
        want = models.get(match[1], (3 if third else 2) if two else 1)
        if match[1] == "FrozenFold":  # reads its row twice, the second time of the policy alone
            assert found.count("LDG.E.128") in (3 * want, 4 * want), (kernel, found)
            want = 1
        assert found.count("LDG.E.EF.128") in (3 * want, 4 * want), (kernel, found)
        assert all(x.startswith("LDG") for x in found), f"{kernel}: local memory or atomics {found}"
        checked += 1
    assert checked == 28


# Row of results/counts.csv -> kernel, logits of a packet, and its work in each loop: a second
# normaliser, of rounded products, takes one exponential more per logit, and its fold stores them.
COUNTED = {
    "fold_one_small": ("Fold<Bf16, false, true>", 8, Work(8, 1, 0)),
    "fold_one": ("Fold<float, false, false>", 4, Work(4, 1, 0)),
    "fold_one keeping": ("Fold<float, false, false>", 4, Work(8, 1, 1)),
    "fold_two_small": ("Fold<float, true, true>", 4, Work(8, 2, 0)),
    "fold_two_small keeping": ("Fold<float, true, true>", 4, Work(12, 2, 1)),
    "gradient_one_small": ("Gradient<Bf16, false, true>", 8, Work(8, 1, 1)),
    "gradient_one": ("Gradient<float, false, false>", 4, Work(4, 1, 1)),
    "gradient_two_small": ("Gradient<float, true, true>", 4, Work(8, 2, 1)),
    "fold_frozen": ("FrozenFold<Bf16, false, true>", 8, Work(8, 1, 0), Work(8, 1, 1)),
    "frozen_factors": ("FrozenFactor<Bf16>", 8, Work(8, 1, 1)),
}


def test_instructions_per_logit_are_as_counted():
    """The account on paper rests on them: none more than 5 % above the table, and none so far
    below that the table is an old one."""
    code = {kernel_name(k): x for k, x in listings(dump("-sass", "-arch", "sm_90a")).items()}
    lines = csv.DictReader(COUNTS.read_text().splitlines())
    counted = {x["name"]: float(x["cuda"]) for x in lines if x["unit"] == "instructions/logit"}
    assert counted.keys() == COUNTED.keys()
    found = {
        name: sum(instructions(code[kernel], packet) for packet in packets) / logits
        for name, (kernel, logits, *packets) in COUNTED.items()
    }
    assert {k: n for k, n in found.items() if k in MOST and n > MOST[k][0]} == {}
    bad = {k: (n, counted[k]) for k, n in found.items() if not 0.9 < n / counted[k] <= 1.05}
    assert bad == {}, found


def loops(kernel: str) -> list[list[str]]:
    """Instructions of the loops of a kernel on sm_90a, from a backward branch's target to it."""
    code: list[tuple[int, str]] = []
    inside = False
    for line in dump("-sass", "-arch", "sm_90a").splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            inside = kernel_name(match[1]) == kernel
        elif inside and (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            code.append((int(match[1], 16), match[2]))
    place = {address: k for k, (address, _) in enumerate(code)}
    found = []
    for k, (address, text) in enumerate(code):
        match = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        if match and int(match[1], 16) <= address and int(match[1], 16) in place:
            found.append([x for _, x in code[place[int(match[1], 16)] : k + 1]])
    return found


def test_short_lists_live_in_registers():
    lists = {k: u for k, u in resources().items() if k[0].startswith("ListKernel")}
    assert len(lists) == 6 * len(ARCHS)
    assert {k: u for k, u in lists.items() if u.shared or u.registers > 104} == {}


@pytest.mark.parametrize(
    ("kernel", "shuffles", "most"),
    [
        # a pair: two numbers of the other item, and back what it is pushed by
        ("ListKernel<float, float, ListPair>", [12], 48),
        # rank and greatest score; the sum of exponentials; what an item is drawn by
        ("ListKernel<float, float, ListStages>", [8, 8, 12], 70),
    ],
    ids=["pair", "plackett_luce"],
)
def test_instructions_of_a_step_from_lane_to_lane(kernel, shuffles, most):
    """Four steps are unrolled. A list of 16 takes 8 steps of pair, 15 of plackett_luce."""
    rotating = [x for x in loops(kernel) if sum("SHFL.IDX" in i for i in x) in shuffles]
    plain = sorted(rotating, key=len)[: len(shuffles)]
    assert len(plain) == len(shuffles)
    assert sum(map(len, plain)) / 4 <= most, [len(x) for x in plain]


def test_the_committed_table_is_of_these_kernels():
    """Names alone: another version of nvcc may use a register more."""
    if not TABLE.exists():
        pytest.skip("the table is not beside the tests")
    rows = list(csv.reader(TABLE.read_text().splitlines()))[1:]
    assert {(r[0], r[1]) for r in rows} == set(resources())


if __name__ == "__main__":
    TABLE.write_text(table())
