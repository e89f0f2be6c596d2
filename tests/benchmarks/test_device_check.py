"""benchmarks/device_check.py from end to end on tiny CPU inputs, and its GPU clock on a stand-in:
a script that a GPU runs once must not fail for a reason that could have been seen here."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import device_check, device_stages, inside, measure, process, results, small, timing
from benchmarks.cases import CASES
from benchmarks.peers import VARIANTS

ROOT = Path(__file__).resolve().parents[2]


class FakeCuda(SimpleNamespace):
    """What timing.Cuda uses of torch.cuda, on CPU tensors. A recorded event is a tick of 1 ms."""

    def __init__(self) -> None:
        super().__init__(ticks=0, log=[], lost=False)

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None, synchronize=lambda: None)

        def record():
            self.ticks += 1
            event.at = self.ticks

        event.record, event.elapsed_time = record, lambda end: float(end.at - event.at)
        return event

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("side waits"))

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("here waits"))

    @contextlib.contextmanager
    def stream(self, side):
        self.log.append("warm")
        yield

    @contextlib.contextmanager
    def graph(self, graph):
        self.log.append("capture")
        yield

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def empty_cache(self):
        self.log.append("emptied")

    def reset_peak_memory_stats(self):
        self.log.append("reset")

    def memory_allocated(self):
        return 100

    def max_memory_allocated(self):
        return 100 + 3 * 2**20

    def mem_get_info(self):
        return 10 << 30, 80 << 30

    def get_device_properties(self, index):
        return SimpleNamespace(name="a card", multi_processor_count=132, total_memory=80 << 30)


class Stub(timing.Cuda):
    tensors = "cpu"


@pytest.fixture
def stub():
    return Stub(FakeCuda())


def test_a_replayed_call_is_warmed_behind_what_it_reads(stub):
    calls = []
    seconds = stub.replayed(lambda: calls.append(1), repeats=5, rounds=3)
    assert seconds == pytest.approx(1e-3 / 5) and len(calls) == 3 + 5
    log = stub.api.log
    assert log[:4] == ["side waits", "warm", "here waits", "capture"]
    assert log[4:] == ["replay"] * 4  # once to load it, then the rounds


def test_a_case_on_a_gpu_has_memory_and_ratios(stub):
    case = CASES["tdpo-trainable-target-N8192"].resized("tiny")
    variants = [VARIANTS[n] for n in ("eager log_softmax", "torch linear_cross_entropy")]
    rows = {r["variant"]: r for r in measure.time_case(case, variants[:1], stub, 2)}
    row = rows["eager log_softmax"]
    assert row["peak_mib"] == 3 and row["ratio_forward"] > 0 and row["ratio_cpu"] != row["ratio"]
    assert rows[results.LIMIT]["wall_s"] == pytest.approx(4e-3)  # four products, a tick each
    large = CASES["tdpo-trainable-target-N8192"]
    row, step = measure.prepare(variants[0], large, None, None, stub)
    assert step is None and row["status"] == "skipped" and "fit" in row["reason"]
    assert stub.describe()["gpu"] == "a card"


def test_a_lost_device_ends_the_process_and_the_next_goes_on_behind_it(tmp_path, monkeypatch, stub):
    """The row that broke it is on disk; rows before it are not made again."""
    made = []

    def stage(s):
        for name in ("first", "second", "third"):

            def one(name=name):
                made.append(name)
                stub.api.lost = name == "second"
                if name == "second":
                    raise RuntimeError("illegal memory access")
                return {"us": 1.0}

            s.timed((name,), one)

    monkeypatch.setattr(device_check, "PROCESSES", ({"kernels": (stage, 60)},))
    monkeypatch.setattr(device_check, "device_of", lambda kind: stub)
    ran = []

    def run(command, seconds):
        ran.append(device_check.run_stages(["kernels"], tmp_path, False, seconds))
        stub.api.lost = False
        return process.Ended(ran[-1], 1.0, "")

    monkeypatch.setattr(process, "run", run)
    found = device_check.supervise(["kernels"], tmp_path, False, 60)
    assert ran == [device_check.LOST, 0] and found["status"] == 0
    assert made == ["first", "second", "third"]
    assert "second" in device_check.verdict("kernels", tmp_path, found)["bad"]


def test_a_process_that_dies_leaves_a_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    log = results.Log(file, "heads")
    assert log.trying("a", "x") and not log.done
    log.add(("a", "x"), {"status": "ok"})
    assert log.trying("a", "y")  # and the process is gone
    again = results.Log(file, "heads")
    assert again.done == {("a", "x"), ("a", "y")} and not again.trying("a", "y")
    last = results.read_log(file)[-1]
    assert last["status"] == "failed" and last["reason"] == "its process ended"
    assert results.Log(file, "lists").done == set()


@pytest.mark.slow
def test_the_script_runs_from_end_to_end(tmp_path):
    pytest.importorskip("triton", reason="the smoke run is of Triton's interpreter")
    command = [
        sys.executable, "-m", "benchmarks.device_check", "--smoke", "--out", str(tmp_path),
        "--commit", "abc1234", "--record", "--minutes", "60",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["launched.jsonl", "linear_logps.csv", "measured.csv", "report.json",
                     "rows.jsonl", "tests.log"]  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == ["machine", *device_check.STAGES]
    assert report["machine"]["found"]["commit"] == "abc1234"
    for name in ("small", "kernels", "heads", "lists", "peers", "tests", "more"):
        assert report[name]["status"] == 0, (name, report[name])
    # torch has fp32 results of bf16 products on GPUs alone
    assert [b.split()[1] for b in report["ceilings"]["bad"]] == ["out", "added"]
    assert report["sanitizer"]["status"] == "memcheck: absent, racecheck: absent"
    assert report["sanitizer"]["clean"] and "nothing recorded" in done.stdout
    rows = [r for r in results.read_log(tmp_path / "rows.jsonl") if r["key"] != ["end"]]
    ours = [r for r in rows if r["stage"] == "heads" and r["key"][1].startswith("prefkern triton")]
    assert len(ours) == 12 and all(r["status"] == "ok" or "tail" in r["reason"] for r in ours)
    assert len([r for r in rows if r["stage"] == "kernels"]) == len(inside.KERNELS)
    assert {r["variant"] for r in results.read(tmp_path / "measured.csv")} >= {"prefkern triton"}


def test_a_gpu_is_asked_for(tmp_path, capsys):
    if torch.cuda.is_available():
        return
    with pytest.raises(SystemExit):
        device_check.main(["--out", str(tmp_path)])
    assert "--smoke" in capsys.readouterr().err


def test_the_library_is_built_for_the_card():
    command, _, environment = device_check.build_command((9, 0))
    assert command[-2:] == ["-e", "."] and environment == {"PREFKERN_CUDA_ARCHS": "sm_90a"}
    assert device_check.build_command((8, 6))[2] == {"PREFKERN_CUDA_ARCHS": "sm_86"}


def test_the_sanitizer_is_absent_refused_or_unclean(tmp_path, monkeypatch):
    for status, text, word, clean in (
        ("absent", "", "absent", True), (1, "Device not supported", "absent", True),
        (9, "ERROR SUMMARY: 1 error", "9", False), ("out of time", "", "out of time", True),
        (0, "", "0", True),
    ):  # fmt: skip
        monkeypatch.setattr(process, "run", lambda *a, s=status, t=text: process.Ended(s, 1.0, t))
        found = device_check.sanitizer(tmp_path, False, 10)
        assert found["clean"] == clean and (word == "0" or word in found["status"])


def test_small_alone(capsys, monkeypatch):
    """What compute-sanitizer is run over; a check that fails says so and ends with 1."""
    assert small.main("cpu", "cpu", "light") == 0
    assert "list_rank softmax fp64 ok" in capsys.readouterr().out
    monkeypatch.setitem(small.BOUND, torch.float64, -1.0)
    monkeypatch.setattr(small, "list_rank", None)
    assert small.main("cpu", "cpu", "light") == 1
    out = capsys.readouterr().out
    assert "segment_sum fp64 wrong above -1" in out
    assert "list_rank pair fp32 failed TypeError" in out


def test_only_what_a_passing_check_launched_is_recorded(tmp_path):
    file, out = tmp_path / "ran_on.json", tmp_path / "out"
    out.mkdir()
    old = {"gpu": "old", "commit": "0"}
    before = dict.fromkeys(("fold_one", "fold_two", "list_pairs", "list_stages"), old)
    file.write_text(json.dumps(before))
    report = {"machine": {"found": {"gpu": "a card", "commit": "abc"}}}
    assert "no seen_kernels()" in device_check.record(report, out, file)
    log = results.Log(out / "rows.jsonl", "small")
    log.add(("cuda one",), {"status": "ok", "launched": {"cuda": ["fold_one", "fold_two"]}})
    lines = [
        {"key": ["t1"], "status": "failed", "launched": {"cuda": ["fold_two"], "triton": ["x"]}},
        {"key": ["t2"], "status": "ok", "launched": {"cuda": ["list_pairs"]}},
    ]
    (out / "launched.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    assert "2 of 4 kernels recorded, 1 launched by a check that failed" in device_check.record(
        report, out, file
    )
    ran = json.loads((out / "ran_on.json").read_text())
    new = {"gpu": "a card", "commit": "abc"}
    assert ran == {"fold_one": new, "fold_two": None, "list_pairs": new, "list_stages": old}
    assert json.loads(file.read_text()) == before
    unclean = report | {"sanitizer": {"status": "memcheck: 9", "clean": False}}
    assert "memcheck: 9" in device_check.record(unclean, out, file)
    log.add(("cuda two",), {"status": "ok", "launched": {"cuda": ["unheard_of"]}})
    assert "no line for unheard_of" in device_check.record(report, out, file)


def test_a_backend_that_small_found_wrong_is_not_timed(tmp_path, stub):
    log = results.Log(tmp_path / "rows.jsonl", "small")
    log.add(("triton linear_logps frozen",), {"status": "wrong"})
    log.add(("cuda list_rank pair",), {"status": "failed"})
    s = device_stages.Stage(tmp_path, True, float("inf"), log, stub)
    assert s.backends("linear") == ["cuda"] and s.backends("list_rank") == ["triton"]
