"""Every benchmark on tiny shapes: results are right and complete; no time is judged."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_linear_logps,
    bench_objective,
    harness,
    oracle,
    parts,
    peaks,
    plot,
)
from benchmarks.__main__ import parser
from benchmarks.cases import CASES, STEPS, Case, make_inputs
from benchmarks.peers import VARIANTS
from benchmarks.variants import Variant

ROOT = Path(__file__).resolve().parents[2]
# Compiling takes seconds a shape and tests nothing of ours.
INTERPRETED = [v for v in VARIANTS.values() if not v.compiled]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_case(name, tmp_path):
    case = dataclasses.replace(CASES[name].resized("tiny"), threads=1)
    variants = [v for v in INTERPRETED if case.step in v.steps]
    truth = oracle.evaluate(case, make_inputs(case))
    rows = {row["variant"]: row for row in harness.time_case(case, variants, truth, rounds=2)}
    assert set(rows) == {harness.LIMIT, *(v.name for v in variants)}
    for variant, row in rows.items():
        assert row["status"] in ("ok", "missing"), (variant, row["reason"])
        assert set(row) <= set(harness.COLUMNS)
        if row["status"] == "missing":
            assert row["reason"]
        else:
            assert row["wall_s"] > 0 and row["ratio"] > 0
    assert rows["prefkern eager"]["status"] == "ok"
    assert rows["eager log_softmax"]["status"] == "ok"

    results = bench_linear_logps.Results(tmp_path / "linear_logps.csv")
    results.add(bench_linear_logps.with_versions(list(rows.values())))
    bench_linear_logps.table(list(rows.values()))
    with results.path.open(newline="") as file:
        assert [r["variant"] for r in csv.DictReader(file)] == list(rows)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("masked", [False, True])
def test_oracle_against_autograd(step, masked):
    """The blocked float64 reference against one plain graph over all rows."""
    case = Case("x", step, dtype="float64", masked=masked).resized("tiny")
    inputs = make_inputs(case)
    before, oracle.ROWS = oracle.ROWS, 7
    try:
        truth = oracle.evaluate(case, inputs)
    finally:
        oracle.ROWS = before
    stats = oracle._tokens(
        step, inputs.hidden, inputs.weight, inputs.ref_hidden, inputs.ref_weight, inputs.targets
    )
    stats = [s.detach() if i == 1 else s for i, s in enumerate(stats)]
    loss = oracle._reduce(step, stats, inputs.targets, inputs.S)
    loss.backward()
    torch.testing.assert_close(truth.loss, loss.detach())
    torch.testing.assert_close(truth.d_hidden, inputs.hidden.grad)
    torch.testing.assert_close(truth.d_weight, inputs.weight.grad)


def test_a_wrong_variant_is_not_timed():
    case = CASES["dpo-fp32-t1"].resized("tiny")
    right = VARIANTS["eager log_softmax"].build(case)
    wrong = Variant("wrong", ("dpo",), lambda case: lambda x: right(x) * 1.01)
    truth = oracle.evaluate(case, make_inputs(case))
    row = harness.time_case(case, [wrong], truth, rounds=1)[1]
    assert row["status"] == "refused" and "loss" in row["reason"] and "wall_s" not in row


def test_a_missing_peer_is_an_empty_row():
    def build(case):
        import package_that_does_not_exist  # noqa: F401

    case = CASES["dpo-fp32-t1"].resized("tiny")
    truth = oracle.evaluate(case, make_inputs(case))
    row = harness.time_case(case, [Variant("absent", ("dpo",), build)], truth, rounds=1)[1]
    assert row["status"] == "missing" and "package_that_does_not_exist" in row["reason"]


def test_bare_products_are_the_products():
    """Every candidate for the limit computes the product it stands for."""
    g = torch.Generator().manual_seed(0)
    h, w, dz = (torch.randn(s, generator=g) for s in ((6, 5), (70, 5), (6, 70)))
    before, peaks.VOCABULARY_BLOCKS = peaks.VOCABULARY_BLOCKS, (32,)
    try:
        forward, d_hidden, d_weight = (
            peaks._forward(h, w),
            peaks._d_hidden(dz, w),
            peaks._d_weight(dz, h),
        )
    finally:
        peaks.VOCABULARY_BLOCKS = before
    for call, want in (
        (forward["mm"], h @ w.T),
        (forward["oneDNN"], h @ w.T),
        (d_hidden["mm"], dz @ w),
        (d_hidden["oneDNN"], dz @ w),
        (d_weight["mm"], dz.T @ h),
        (d_weight["oneDNN"], dz.T @ h),
    ):
        torch.testing.assert_close(call(), want)
    for found in (forward, d_hidden, d_weight):
        for call in found.values():
            call()


def test_memory_row():
    case = CASES["dpo-fp32-t1"].resized("quick")
    row = harness.memory_row(case, VARIANTS["eager log_softmax"])
    logits = case.shape.N * case.shape.V * 4 / 2**20
    assert row["gradients_mib"] == case.gradient_bytes / 2**20
    # full logits and at least one copy; the gradients come on top
    assert row["peak_mib"] > 1.9 * logits


def test_objective_and_parts(tmp_path):
    for path in (bench_objective.run(tmp_path, "tiny", 1), parts.run(tmp_path, "tiny", 1)):
        assert path.stat().st_size > 0
        plot.draw(path)


def test_options():
    args = parser().parse_args(["--quick", "--cases", "dpo-fp32-t1", "host", "--threads", "1", "2"])
    assert args.quick and args.cases == ["dpo-fp32-t1", "host"] and args.threads == [1, 2]
    with pytest.raises(SystemExit):
        parser().parse_args(["--cases", "dpo-fp33"])


def test_command_line(tmp_path):
    """The way `prefkern bench` starts it: worker processes, memory, CSV, pictures."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--repeats", "1", "--out", str(tmp_path),
         "--cases", "dpo-masked-t1", "--variants", "prefkern eager"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "linear_logps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["status"] for r in rows] == ["ok"] * 2
    assert all(float(r["peak_mib"]) > 0 for r in rows[1:])
    assert (tmp_path / "linear_logps_dpo-masked-t1.png").exists()
