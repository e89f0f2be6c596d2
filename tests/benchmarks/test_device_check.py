"""benchmarks/device_check.py from end to end on tiny CPU inputs: the script that a GPU runs once
must not fail for a reason that could have been seen here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import device_check

ROOT = Path(__file__).resolve().parents[2]


def test_the_script_runs_and_says_what_is_missing(tmp_path):
    pytest.importorskip("triton", reason="the smoke run is of Triton's interpreter")
    command = [
        sys.executable, "-m", "benchmarks.device_check", "--smoke", "--out", str(tmp_path),
        "--only", "machine", "heads", "epilogues", "sanitizer",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "device_check.json").read_text())
    assert report["machine"]["status"] == 0 and report["machine"]["found"]["commit"] != ""
    assert report["epilogues"]["status"] == "needs a GPU's events"
    assert report["sanitizer"]["status"] == 0, report["sanitizer"]
    rows = report["heads"]["rows"]
    ours = [r for r in rows if r["variant"].startswith("prefkern triton")]
    assert len(ours) == 9 and all(r["status"] == "ok" and r["over_bare"] > 0 for r in ours), ours
    reference = [r for r in rows if r["variant"] == "prefkern eager"]
    assert all(r["status"] == "ok" and r["err_d_hidden"] < 1e-2 for r in reference), reference
    others = {r["variant"]: r["status"] for r in rows if not r["variant"].startswith("prefkern")}
    assert others["eager"] == "ok" and others["bare products"] == "ok", others


def test_a_gpu_is_asked_for(tmp_path):
    import torch

    if torch.cuda.is_available():
        return
    command = [sys.executable, "-m", "benchmarks.device_check", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--smoke" in done.stderr


def clean_report() -> dict:
    found = {"gpu": "NVIDIA H200", "commit": "abc1234", "backends": {"cuda": [], "triton": []}}
    stages = {name: {"status": 0} for name in ("tests", "sanitizer")}
    return {"machine": {"status": 0, "found": found}, **stages}


def test_a_clean_run_is_recorded_and_another_is_not(tmp_path):
    file = tmp_path / "ran_on.json"
    file.write_text(json.dumps({"fold_one": None, "gradient_one": None}))
    for stage in ("tests", "sanitizer"):
        report = clean_report() | {stage: {"status": "out of time"}}
        assert f"not clean: {stage}" in device_check.record(report, file)
    report = clean_report()
    report["machine"]["found"]["backends"]["cuda"] = ["the library is not there"]
    assert "was not on" in device_check.record(report, file)
    assert set(json.loads(file.read_text()).values()) == {None}
    assert "2 kernels recorded" in device_check.record(clean_report(), file)
    ran = json.loads(file.read_text())
    assert ran["fold_one"] == {"gpu": "NVIDIA H200", "commit": "abc1234"}
