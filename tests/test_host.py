"""prefkern._C: build and CPU information, batch planners."""

import itertools
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

host = pytest.importorskip("prefkern._C", reason="prefkern was installed without the native part")

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("first_fit_decreasing", "in_order")


def batches(lengths, budget, cu_groups=None, **options):
    groups, cu = host.plan_batches(lengths, budget, cu_groups, **options)
    assert groups.dtype == np.int64 and cu.dtype == np.int64
    return [groups[a:b].tolist() for a, b in itertools.pairwise(cu)]


def first_fit_decreasing(costs, budget, max_groups):
    """The rule in words: largest first, ties by index, first batch with room."""
    plan, room = [], []
    for g in sorted(range(len(costs)), key=lambda g: (-costs[g], g)):
        fits = [b for b in range(len(plan)) if room[b] >= costs[g] and len(plan[b]) < max_groups]
        if fits:
            b = fits[0]
        else:
            b = len(plan)
            plan.append([])
            room.append(budget)
        plan[b].append(g)
        room[b] -= costs[g]
    return [sorted(batch) for batch in plan]


def in_order(costs, budget, max_groups):
    plan = []
    for g, cost in enumerate(costs):
        fits = plan and sum(costs[x] for x in plan[-1]) + cost <= budget
        if fits and len(plan[-1]) < max_groups:
            plan[-1].append(g)
        else:
            plan.append([g])
    return plan


ORACLES = {"first_fit_decreasing": first_fit_decreasing, "in_order": in_order}


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_plan_equals_its_rule(method, data):
    groups = data.draw(st.lists(st.lists(st.integers(0, 20), min_size=0, max_size=4), max_size=25))
    costs = [sum(group) for group in groups]
    budget = data.draw(st.integers(max([1, *costs]), 60 + max([1, *costs])))
    max_groups = data.draw(st.none() | st.integers(1, 5))
    lengths = np.array([x for group in groups for x in group], dtype=np.int32)
    cu = np.cumsum([0, *map(len, groups)])
    plan = batches(lengths, budget, cu, method=method, max_groups=max_groups)
    assert plan == ORACLES[method](costs, budget, max_groups or len(groups) + 1)
    # What every plan owes its caller: each group once, whole, within the budget.
    assert sorted(g for batch in plan for g in batch) == list(range(len(groups)))
    assert all(batch and sum(costs[g] for g in batch) <= budget for batch in plan)


def test_plan_known_answers():
    lengths = [6, 4, 5, 5, 3, 7]
    assert batches(lengths, 10) == [[4, 5], [0, 1], [2, 3]]
    assert batches(lengths, 10, method="in_order") == [[0, 1], [2, 3], [4, 5]]
    pairs = [0, 2, 4, 6]
    assert batches(lengths, 20, pairs, method="in_order") == [[0, 1], [2]]
    assert batches(lengths, 20, pairs, max_groups=1) == [[0], [1], [2]]


@pytest.mark.parametrize("method", METHODS)
def test_plan_of_nothing(method):
    groups, cu = host.plan_batches([], 8, method=method)
    assert groups.tolist() == [] and cu.tolist() == [0]
    groups, cu = host.plan_batches(np.zeros(0, np.int64), 8, [0], method=method)
    assert groups.tolist() == [] and cu.tolist() == [0]


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint8, np.uint64])
def test_plan_takes_any_integer_type_and_stride(dtype):
    lengths = np.array([3, 99, 4, 99, 5, 99], dtype=dtype)[::2]
    assert batches(lengths, 7, method="in_order") == [[0, 1], [2]]


def test_first_fit_decreasing_is_tight_and_fast():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2048, 200_000)
    plan, cu = host.plan_batches(lengths, 8192)
    assert len(cu) - 1 <= 1.01 * lengths.sum() / 8192
    assert len(plan) == len(lengths)


SANITIZED = r"""
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <random>
#include "cpu_info.h"
#include "planner.h"

int main() {
  std::mt19937_64 random(0);
  for (int64_t round = 0; round < 400; ++round) {
    std::vector<int64_t> costs(size_t(round % 37));
    for (auto& c : costs) c = int64_t(random() % 21);
    const int64_t limit = round % 3 == 0 ? INT64_MAX : 1 + round % 4;
    for (const prefkern::BatchPlan& plan : {prefkern::plan_in_order(costs, 20, limit),
                             prefkern::plan_first_fit_decreasing(costs, 20, limit)}) {
      if (plan.groups.size() != costs.size()) return 1;
      if (plan.cu_batches.back() != int64_t(costs.size())) return 2;
    }
  }
  std::puts(prefkern::runnable_variants(prefkern::detect_cpu()).front().c_str());
}
"""


def test_headers_under_sanitizers(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    source, program = tmp_path / "planner.cpp", tmp_path / "planner"
    source.write_text(SANITIZED)
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "baseline\n"), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3.0], 5), r"lengths must be a 1-d integer array, got float64 \[1\]; pass the token"),
        (([[1, 2]], 5), r"lengths must be a 1-d integer array, got int64 \[1, 2\]"),
        (([True], 5), "lengths must be a 1-d integer array, got bool"),
        ((["a"], 5), "lengths must be a 1-d integer array, got <U1"),
        ((object(), 5), "lengths must be a 1-d integer array, got object"),
        ((3, 5), r"lengths must be a 1-d integer array, got int64 \[\]"),
        ((np.array([2**63], np.uint64), 5), "lengths must fit in int64, got 9223372036854775808"),
        (([4, -1], 5), r"between 0 and 2\*\*31 - 1 .* got -1 for sequence 1"),
        (([2**31], 2**40), r"between 0 and 2\*\*31 - 1 .* got 2147483648 for sequence 0"),
        (([4, 6], 5), "every group must fit into the budget of 5 tokens, and group 1 has 6; raise"),
        (([3, 3], 5, [0, 2]), "group 0 has 6; raise the budget"),
        (([4], 0), "budget must be at least 1 token per batch, got 0"),
        (([1, 2], 5, [0, 1]), r"start at 0 and end at the number of sequences 2, got 0 \.\.\. 1"),
        (([1, 2], 5, [1, 2]), r"start at 0 and end at the number of sequences 2, got 1 \.\.\. 2"),
        (([1, 2], 5, np.zeros(0, int)), "number of sequences 2, got an empty array"),
        (([1, 2], 5, [0, 2, 1, 2]), "cu_groups must never decrease, got 2 then 1 at position 1"),
        (([1, 2], 5, [0.0, 2.0]), "cu_groups must be a 1-d integer array, got float64"),
    ],
)
def test_plan_refuses_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        host.plan_batches(*arguments)


def test_plan_refuses_bad_options():
    with pytest.raises(
        ValueError, match="method must be 'first_fit_decreasing' or 'in_order', got 'x'"
    ):
        host.plan_batches([1], 5, method="x")
    with pytest.raises(ValueError, match="max_groups must be at least 1 or None, got 0"):
        host.plan_batches([1], 5, max_groups=0)


def test_build_info_names_what_was_built():
    info = host.build_info()
    assert {"compiler", "compiler_version", "flags", "isa_flags", "torch"} <= set(info)
    assert info["isa_variants"][0] == "baseline"
    assert "-fopenmp" not in info["flags"]
    assert info["torch_target"] == "0x020a000000000000"


def test_cpu_capabilities_agree_with_the_kernel():
    cpu = host.cpu_capabilities()
    assert cpu["architecture"] == {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    assert cpu["variants"][0] == "baseline"
    if cpu["architecture"] != "x86_64":
        pytest.skip("the flag names of /proc/cpuinfo below are those of x86-64")
    with open("/proc/cpuinfo") as file:
        flags = set(next(line for line in file if line.startswith("flags")).split(":")[1].split())
    linux = {"sse4.2": "sse4_2", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
    linux["avx512fp16"] = "avx512_fp16"
    for name in ("sse4.2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl",
                 "avx512dq", "avx512vnni", "avx512bf16", "avx512fp16", "amx_bf16"):  # fmt: skip
        assert (name in cpu["isa"]) == (linux.get(name, name) in flags), name
    assert ("avx512bf16" in cpu["variants"]) == ({"avx512f", "avx512_bf16", "avx512vl"} <= flags)
