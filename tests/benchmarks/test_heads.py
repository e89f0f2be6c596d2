"""Every benchmark on tiny shapes: results are right and complete; no time is judged."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import heads, measure, objective, oracle, parts, plot, process, products, results
from benchmarks.__main__ import chosen, main, parser
from benchmarks.cases import CASES, GROUPS, NEEDS, Case, make_inputs
from benchmarks.peers import VARIANTS
from benchmarks.timing import Cpu
from benchmarks.variants import Variant

ROOT = Path(__file__).resolve().parents[2]
CPU = Cpu()
TINY = CASES["dpo-fp32-t1"].resized("tiny")
STEPS = [step for step in NEEDS if step != "trl"]
HEAD_CASES = [name for name, case in CASES.items() if case.step != "trl"]
# (step, kind of case) -> one that is drawn: a picture takes as long as the rest of a tiny case
PICTURED = {(CASES[name].step, name.partition("-")[0]): name for name in HEAD_CASES}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(case: Case, variants, rounds: int = 1) -> dict[str, results.Row]:
    return {r["variant"]: r for r in measure.time_case(case, variants, CPU, rounds)}


def python(code: str, **more) -> str:
    done = subprocess.run(
        [sys.executable, *more.pop("options", ()), "-c", code], capture_output=True, text=True,
        check=False, **more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", HEAD_CASES)
def test_case(name, tmp_path):
    case = dataclasses.replace(CASES[name].resized("tiny"), threads=1)
    # compiling takes seconds a shape and tests nothing of ours
    variants = [v for v in heads.serving(case, "cpu") if not v.compiled and "triton" not in v.name]
    rows = rows_of(case, variants)
    assert set(rows) == {results.LIMIT, *(v.name for v in variants)}
    for variant, row in rows.items():
        assert row["status"] in ("ok", "missing"), (variant, row["reason"])
        if row["status"] == "missing":
            assert row["reason"]
        else:
            assert row["wall_s"] > 0 and row["ratio"] > 0 and row["ratio_forward"] > 0
    assert rows["prefkern eager"]["status"] == rows["eager log_softmax"]["status"] == "ok"
    table = results.Table(tmp_path / "linear_logps.csv")
    table.add(heads.with_versions(list(rows.values())))
    read = results.read(table.path)
    assert [r["variant"] for r in read] == list(rows)
    for text in (results.text_table(list(rows.values())), "\n".join(results.markdown(read))):
        assert all(variant in text for variant in rows)
    if name in PICTURED.values():
        assert plot.draw(table.path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_variant_has_a_colour(device):
    for case in CASES.values():
        for variant in heads.serving(case, device):
            assert plot.colour_of(variant.name)


def test_a_run_replaces_the_rows_of_its_cases_alone(tmp_path):
    path = tmp_path / "linear_logps.csv"
    results.Table(path).add({"case": case, "variant": "x", "cpu_s": 1.0} for case in "ab")
    results.Table(path, again={"b"}).add([{"case": "b", "variant": "y", "cpu_s": 2.0}])
    found = [(r["case"], r["variant"], r["cpu_s"]) for r in results.read(path)]
    assert found == [("a", "x", "1"), ("b", "y", "2")]
    results.Table(path)
    assert results.read(path) == []


def test_a_step_inside_trl():
    pytest.importorskip("trl", reason="the bench environment has it")
    case = CASES["trl-32k"].resized("tiny")
    rows = rows_of(case, heads.serving(case, "cpu"), rounds=2)
    assert {"TRL", "TRL, full logits", "TRL + prefkern", "TRL + prefkern, 1 GiB"} <= set(rows)
    limit = rows.pop(results.LIMIT)
    assert limit["products"] == 4 and "layers" not in limit["products_used"]
    for row in rows.values():
        if row["status"] == "missing":
            assert "liger" in row["reason"]
            continue
        assert row["status"] == "ok" and row["cpu_s"] > 0, row
        assert row["ratio_cpu"] > 0 and "ratio_forward" not in row
        assert row["err_d_weight"] < 1e-5 and row["err_d_hidden"] < 1e-5


def test_no_trainer_sees_the_forward_of_another():
    """All are built over the same parameters; what one does to its model stays with it."""
    pytest.importorskip("trl", reason="the bench environment has it")
    from benchmarks import trl_step

    case = CASES["trl-32k"].resized("tiny")
    x = trl_step.make_inputs(case)
    before = [set(vars(m)) for model in (x.model, x.ref_model) for m in model.modules()]
    for build, _ in trl_step.TRAINERS.values():
        with contextlib.suppress(ModuleNotFoundError):
            build(case, x)
    after = [set(vars(m)) for model in (x.model, x.ref_model) for m in model.modules()]
    assert after == before


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("masked", [False, True])
def test_oracle_against_autograd(step, masked, monkeypatch):
    """The blocked float64 reference against one plain graph over all rows."""
    monkeypatch.setattr(oracle, "ROWS", 7)
    x = make_inputs(Case("x", step, dtype="float64", masked=masked).resized("tiny"))
    truth = oracle.evaluate(Case("x", step, dtype="float64").resized("tiny"), x)
    arguments = (x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.targets)
    stats = oracle.statistics(NEEDS[step], *arguments)
    loss = oracle.reduce(step, [s.detach() if i == 1 and step != "ent" else s
                                for i, s in enumerate(stats)], x)  # fmt: skip
    loss.backward()
    torch.testing.assert_close(truth.loss, loss.detach())
    torch.testing.assert_close(truth.gradients["d_hidden"], x.hidden.grad)
    torch.testing.assert_close(truth.gradients["d_weight"], x.weight.grad)
    for name, value in zip(NEEDS[step], stats, strict=True):
        torch.testing.assert_close(truth.tokens[name], value.detach())


def test_what_is_wrong_missing_or_fails_is_a_row():
    """And what a caller refuses is left out."""
    right = VARIANTS["eager log_softmax"].build(TINY, make_inputs(TINY))

    def absent(case, x):
        import package_that_does_not_exist  # noqa: F401

    def off(x):
        loss, tokens = right(x)
        return loss * 1.01, tokens

    def broken(x):
        raise LookupError("no such launch")

    made = {"wrong": lambda c, x: off, "absent": absent, "broken": lambda c, x: broken}
    variants = [Variant(name, ("dpo",), build) for name, build in made.items()]
    found = list(measure.time_case(TINY, variants, CPU, 1, lambda name: name != "absent"))
    found += measure.time_case(TINY, variants[1:2], CPU, 1)
    rows = {r["variant"]: r for r in found}
    assert rows["wrong"]["status"] == "refused" and "loss" in rows["wrong"]["reason"]
    assert rows["broken"]["status"] == "failed" and "no such launch" in rows["broken"]["reason"]
    assert "package_that_does_not_exist" in rows["absent"]["reason"]
    assert len(found) == 5 and all("wall_s" not in rows[name] for name in made)


def test_a_step_that_fails_while_it_is_timed_is_a_row():
    build, calls = VARIANTS["eager log_softmax"].build, []

    def once(case, x):
        right = build(case, x)
        return lambda x: calls.append(1) or right(x) if not calls else 1 / 0

    rows = rows_of(TINY, [Variant("once", ("dpo",), once)])
    assert rows["once"]["status"] == "failed" and "while timed" in rows["once"]["reason"]


def test_bare_products_are_the_products():
    """Every candidate for the limit computes the product it stands for."""
    g = torch.Generator().manual_seed(0)
    h, w, dz = (torch.randn(s, generator=g) for s in ((6, 5), (70, 5), (6, 70)))
    for product, want in {"forward": h @ w.T, "d_hidden": dz @ w, "d_weight": dz.T @ h}.items():
        found = products.candidates(product, h, w, dz.clone(), (32,))
        assert {"mm", "oneDNN", "mm, 32 columns"} <= set(found)
        for how, call in found.items():
            got = call()
            if got is not None:
                torch.testing.assert_close(got, want, msg=how)
        parts = products.candidates(product, h, w, dz[:, :32].clone(), (32,))
        assert parts and all("columns" in how for how in parts)
        for call in parts.values():
            call()


def test_memory_row(tmp_path):
    """In a process of its own, as ever: one that has freed memory would not ask for it again."""
    case = CASES["dpo-fp32-t1"].resized("quick")
    spec = {"case": case.name, "size": "quick", "device": "cpu", "rounds": 1, "mode": "memory",
            "variants": ["eager log_softmax"]}  # fmt: skip
    (row,), failure = heads.run_worker(spec, 1, tmp_path)
    assert not failure
    logits = case.shape.N * case.shape.V * 4 / 2**20
    assert row["gradients_mib"] == (case.shape.N + case.shape.V) * case.shape.D * 4 / 2**20
    # full logits and at least one copy; the gradients come on top
    assert row["peak_mib"] > 1.9 * logits


def test_objective_and_parts(tmp_path):
    for path in (objective.run(tmp_path, "tiny", 1), parts.run(tmp_path, "tiny", 1)):
        assert path.stat().st_size > 0
        plot.draw(path)


@pytest.mark.slow
def test_host_overhead(tmp_path, monkeypatch):
    for name in [n for n in os.environ if n.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # pytest-benchmark does not measure in a worker of xdist
    path = objective.run_host_overhead(tmp_path)
    rows = {r["what"]: r for r in results.read(path)}
    assert float(rows["linear_logps [cpu]"]["times_torch"]) > 1
    assert not rows["linear_logps [torch]"]["times_torch"] and plot.draw(path)


def test_options(tmp_path):
    args = parser().parse_args(["--quick", "--cases", "dpo-fp32-t1", "host", "--threads", "1", "2"])
    assert args.quick and chosen(args.cases, "cpu") == ["dpo-fp32-t1", "host"]
    assert chosen(["trl", "tail-1-32k"], "cpu") == [*GROUPS["trl"], "tail-1-32k"]
    assert chosen(None, "cuda") == list(GROUPS["gpu"]) and "parts" in chosen(None, "cpu")
    for wrong in (["--cases", "dpo-fp33"], ["--repeats", "0"], ["--device", "tpu"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert main(["--cases", "predicted", "--out", str(tmp_path)]) == 0
    assert results.markdown(results.read(tmp_path / "predicted.csv"))


def test_command_line(tmp_path):
    """The way `prefkern bench` starts it: worker processes, memory, CSV, pictures."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--repeats", "1", "--out", str(tmp_path),
         "--cases", "dpo-masked-t1", "--variants", "prefkern eager"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read(tmp_path / "linear_logps.csv")
    assert [r["status"] for r in rows] == ["ok"] * 2
    assert all(float(r["peak_mib"]) > 0 for r in rows[1:])
    assert (tmp_path / "linear_logps_dpo-masked-t1.png").exists()


def test_trl_kernels_load_without_datasets():
    pytest.importorskip("trl", reason="the bench environment has it")
    code = (
        "import sys, importlib.abc\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'datasets': raise ModuleNotFoundError(name)\n"
        "find = __import__('importlib.util').util\n"
        "real = find.find_spec\n"
        "find.find_spec = lambda name, *a: None if name == 'datasets' else real(name, *a)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from benchmarks.peers import trl_kernels\n"
        "print(*(f.__name__ for f in trl_kernels()))"
    )
    assert python(code, cwd=ROOT).split() == [
        "ChunkedLogProbFunction", "ChunkedDivergenceFunction"
    ]  # fmt: skip


def test_a_tree_that_is_not_installed(tmp_path):
    """`ln -s ../kernels prefkern/kernels` and Python without site hooks: the root comes last."""
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("benchmarks", "prefkern", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    (tmp_path / "prefkern/kernels").symlink_to("../kernels")
    code = (
        "import sys, benchmarks, prefkern, prefkern.kernels\n"
        "print(sys.path[-1], prefkern.kernels.__name__)\n"
        "from benchmarks import small; print(len(list(small.checks('cpu', False))))"
    )
    site = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).resolve().parents[1])}
    words = python(code, options=["-S"], cwd=tmp_path, env=site).split()
    assert words[:2] == [str(tmp_path), "prefkern.kernels"] and int(words[2]) > 15


def test_a_command_out_of_time_ends_with_all_it_started(tmp_path):
    pid = tmp_path / "pid"
    ended = process.run(["sh", "-c", f"sleep 600 & echo $! > {pid}; echo begun; wait"], 3.0)
    assert ended.status == "out of time" and ended.text == "begun\n" and ended.seconds < 600
    stat = Path(f"/proc/{pid.read_text().strip()}/stat")
    # a killed process goes on until its core next takes it up, and stays until it is collected
    for _ in range(600):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        break
    else:
        pytest.fail("the command's child goes on")
    assert process.run(["no-such-program"]).status == "absent"
    assert process.run(["sh", "-c", "kill -SEGV $$"]).status == "SIGSEGV"
