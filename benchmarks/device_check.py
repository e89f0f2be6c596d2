"""One command for a machine with a GPU: right first, then the numbers, most telling ones first.

    python -m benchmarks.device_check --out results/gpu --commit $(git rev-parse --short HEAD)

Stages run in this order, in processes that may die: a row is on disk before the next is tried, and
a process that a bad launch has ended is started again behind that row. What takes about four
minutes stands first (small .. peers); `--minutes` (9) ends the run. Files in --out: rows.jsonl
(everything), report.json (stages), linear_logps.csv (the head rows; benchmarks.plot and
benchmarks.results read it), measured.csv (beside the prediction of model.py), launched.jsonl and
tests.log (the tests), and with --record cuda_ran_on.json, to be copied over prefkern's.

`--smoke` runs the same code on tiny CPU inputs under Triton's interpreter: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import device_stages as stages
from . import inside, model, process, results
from .results import ROOT, Log, Row, read_log
from .timing import DeviceLost, device_of

SLOW = 10  # an interpreter on a busy machine is that much slower than the limits of stages
LOST = 75  # exit status of a process whose device answers no more
RAN_ON = ROOT / "prefkern/cuda_ran_on.json"


def tests(out: Path, smoke: bool, seconds: float) -> Row:
    """tests/device on all cores; every test notes the kernels it has launched."""
    log = out / "launched.jsonl"
    log.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "tests/device", "-q", "-p", "no:cacheprovider",
        f"--launches={log}", "-n", "2" if smoke else "8", "--dist", "loadgroup",
    ]  # fmt: skip
    if smoke:
        command += ["--stand-in", "-k", "error_sum or one_row_over"]
    ended = process.run(command, seconds)
    (out / "tests.log").write_text(ended.text)
    tail = ended.text.strip().splitlines()[-1:] or [""]
    return {"status": ended.status, "seconds": ended.seconds, "reason": tail[0]}


def sanitizer(out: Path, smoke: bool, seconds: float) -> Row:
    """The CUDA kernels under compute-sanitizer. Absent, refused by the machine or out of time is
    not unclean."""
    found = {}
    for tool in ("memcheck", "racecheck"):
        command = [
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex",
            "kns=prefkern", sys.executable, "-m", "benchmarks.small", "cuda", "cuda", "light",
        ]  # fmt: skip
        ended = process.run(command, seconds / 2)
        refused = "Device not supported" in ended.text
        found[tool] = {
            "status": "absent" if refused else ended.status, "seconds": ended.seconds,
            "tail": ended.text[-1500:],
        }  # fmt: skip
    states = {run["status"] for run in found.values()}
    clean = states <= {0, "absent", "out of time"}
    words = 0 if states == {0} else ", ".join(f"{t}: {r['status']}" for t, r in found.items())
    return {"status": words, "clean": clean, "runs": found}


# Stages of one process, in order, each with its limit in seconds
PROCESSES: tuple[dict[str, tuple[Callable[..., object], float]], ...] = (
    {"small": (stages.small, 45)},
    {"ceilings": (stages.ceilings, 20), "kernels": (stages.kernels, 40)},
    {"heads": (stages.heads, 70), "lists": (stages.lists, 20), "peers": (stages.peers, 60)},
    {"tests": (tests, 150)},
    {"more": (stages.more, 90)},
    {"sanitizer": (sanitizer, 80)},
)
COMMANDS = ("tests", "sanitizer")
STAGES = [name for group in PROCESSES for name in group]


# ---- running them --------------------------------------------------------------------------------
def run_stages(names: list[str], out: Path, smoke: bool, seconds: float) -> int:
    """The stages of one process, in that process."""
    limits = {name: stage for group in PROCESSES for name, stage in group.items()}
    end, device = time.monotonic() + seconds, device_of("cpu" if smoke else "cuda")
    for name in names:
        function, limit = limits[name]
        log = Log(out / "rows.jsonl", name)
        if ("end",) in log.done:
            continue
        limit *= SLOW if smoke else 1
        stage = stages.Stage(out, smoke, min(end, time.monotonic() + limit), log, device)
        try:
            function(stage)
        except DeviceLost as lost:
            print(f"{name}: {lost}", flush=True)
            return LOST
        log.add(("end",), {"status": "ok", "in_time": time.monotonic() < stage.deadline})
    return 0


def supervise(names: list[str], out: Path, smoke: bool, seconds: float) -> Row:
    """Runs the stages of one process, again behind the row that ended it, until they are through
    or out of time."""
    end, rows, ended = time.monotonic() + seconds, -1, process.Ended(0, 0.0, "")
    file = out / "rows.jsonl"
    while (left := end - time.monotonic()) > 0 and rows < len(read_log(file, tried=True)):
        rows = len(read_log(file, tried=True))
        command = [
            sys.executable, "-m", "benchmarks.device_check", "--stage", *names, "--out", str(out),
            "--seconds", f"{left:.0f}", *(["--smoke"] if smoke else []),
        ]  # fmt: skip
        ended = process.run(command, left + 10)
        if ended.status == 0:
            break
    return {"status": ended.status, "tail": ended.text[-1500:] if ended.status else ""}


def verdict(name: str, out: Path, ran: Row) -> Row:
    """A stage by its rows."""
    rows = [r for r in read_log(out / "rows.jsonl") if r["stage"] == name]
    ended = [r for r in rows if r["key"] == ["end"]]
    bad = [" ".join(r["key"]) for r in rows if r["status"] in ("failed", "refused", "wrong")]
    ours = [b for b in bad if "prefkern" in b or name in ("small", "ceilings")]
    status: object = 0
    if ours:
        status = f"bad: {'; '.join(ours[:5])}" + (" ..." if len(ours) > 5 else "")
    elif not ended or not ended[-1]["in_time"]:
        status = f"out of time after {len(rows) - len(ended)} rows"
    return {"status": status, "rows": len(rows) - len(ended), "bad": bad, "process": ran}


def machine(smoke: bool, commit: str) -> Row:
    """Where this is; the CUDA library is built where it is missing."""
    device = device_of("cpu" if smoke else "cuda")
    found = results.describe() | {"commit": commit, **device.describe()}
    found["triton"] = results.version("triton")
    tool = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found["driver"] = process.run(tool, 20).text.strip()
    library = ROOT / "prefkern/_ops_cuda.so"
    if not smoke and not library.exists():
        ended = process.run(*build_command(torch.cuda.get_device_capability()))
        found["build"] = {"status": ended.status, "seconds": ended.seconds}
        found["build"]["tail"] = ended.text[-1500:] if ended.status else ""
    found["backends"] = {
        name: inside.reasons(name, "linear_logps", device.tensors, torch.bfloat16)
        for name in (*stages.BACKENDS, "cpu")
    }
    return {"status": 0, "found": found}


def build_command(capability: tuple[int, int]) -> tuple[list[str], float, dict[str, str]]:
    """Compiles for this card alone: (command, seconds, environment)."""
    arch = "sm_{}{}".format(*capability) + ("a" if capability[0] == 9 else "")
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q"]
    return [*install, "-e", "."], 150, {"PREFKERN_CUDA_ARCHS": arch}


def recordable(out: Path) -> tuple[set[str], set[str]] | None:
    """(CUDA kernels launched by a check that passed and by none that failed, those by one that
    failed); None where the backend does not tell what it launched."""
    checks = [r for r in read_log(out / "rows.jsonl") if r["stage"] == "small" and "launched" in r]
    tested = out / "launched.jsonl"
    checks += (
        [json.loads(line) for line in tested.read_text().splitlines()] if tested.exists() else []
    )
    told = [r for r in checks if "cuda" in r["launched"]]
    if not told:
        return None
    good, bad = (
        {k for r in told if (r["status"] == "ok") == right for k in r["launched"]["cuda"]}
        for right in (True, False)
    )
    return good - bad, bad


def record(report: dict[str, Row], out: Path, file: Path = RAN_ON) -> str:
    """Writes `out`/cuda_ran_on.json: `file` with the GPU and commit of this run for every kernel
    that it has launched rightly, which is what lets automatic choice take it; says what it did."""
    found, seen = report["machine"]["found"], recordable(out)
    if not found["gpu"] or not found["commit"]:
        return "nothing recorded: no GPU, or no --commit"
    if report.get("sanitizer", {}).get("clean") is False:
        return f"nothing recorded: {report['sanitizer']['status']}"
    if seen is None:
        return "nothing recorded: the cuda backend has no seen_kernels(), or was off"
    known = json.loads(file.read_text())
    if unknown := sorted((seen[0] | seen[1]) - known.keys()):
        return f"nothing recorded: {file.name} has no line for {', '.join(unknown)}"
    ran = {"gpu": found["gpu"], "commit": found["commit"]}
    new = known | dict.fromkeys(sorted(seen[0]), ran) | dict.fromkeys(seen[1])
    (out / file.name).write_text(json.dumps(new, indent=2) + "\n")
    return (
        f"{len(seen[0])} of {len(known)} kernels recorded, {len(seen[1])} launched by a check that "
        f"failed; copy {out / file.name} over {file}"
    )


def measured(rows: list[Row]) -> Iterator[Row]:
    """Rows of the log under the keys of results/predicted.csv."""
    for row in rows:
        key = {"case": row["key"][0], "variant": row["key"][-1]}
        if row["stage"] in ("heads", "more") and "wall_s" in row:
            yield {"what": "step", **key, "ms": 1e3 * row["wall_s"], "ratio": row.get("ratio")}
            forward = {"ms": 1e3 * row["forward_s"], "ratio": row.get("ratio_forward")}
            yield {"what": "forward", **key, **forward}
        elif row["stage"] == "kernels" and "us" in row:
            yield {"what": "kernel", **key, "ms": row["us"] / 1e3}
        elif row["stage"] == "lists" and "us_kernel" in row:
            yield {"what": "list", **key, "ms": row["us_kernel"] / 1e3}


def write_tables(out: Path, found: Row) -> None:
    rows, where = read_log(out / "rows.jsonl"), {k: found[k] for k in ("gpu", "commit")}
    heads_of = [r for r in rows if r["stage"] in ("heads", "peers", "more") and "case" in r]
    table = results.Table(out / "linear_logps.csv", **where)
    table.add({k: v for k, v in row.items() if k not in ("stage", "key")} for row in heads_of)
    table = results.Table(
        out / "measured.csv",
        ("what", "case", "variant", "ms", "ratio", "predicted_ms", "predicted_ratio"), **where,
    )  # fmt: skip
    table.add(model.beside(measured(rows), found["gpu"]))


def run_all(out: Path, minutes: float, smoke: bool, only: list[str], commit: str) -> dict[str, Row]:
    end = time.monotonic() + 60 * minutes
    report: dict[str, Row] = {"machine": machine(smoke, commit)}
    (out / "rows.jsonl").unlink(missing_ok=True)
    for group in PROCESSES:
        names = [name for name in group if name in only]
        seconds = sum(group[name][1] for name in names) * (SLOW if smoke else 1)
        seconds = min(end - time.monotonic(), seconds)
        if not names or seconds < 5:
            report |= {name: {"status": "no time left"} for name in names}
            continue
        start = time.monotonic()
        if names[0] in COMMANDS:
            found = {names[0]: group[names[0]][0](out, smoke, seconds)}
        else:
            ran = supervise(names, out, smoke, seconds)
            found = {name: verdict(name, out, ran) for name in names}
        report |= found
        for name, stage in found.items():
            print(f"{name}: {stage['status'] or 'ok'}", flush=True)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        (out / "report.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
        write_tables(out, report["machine"]["found"])
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--smoke", action="store_true", help="tiny inputs on the CPU")
    parser.add_argument("--commit", default="", help="what is checked; default: what git says")
    parser.add_argument("--record", action="store_true", help="write cuda_ran_on.json as well")
    parser.add_argument("--stage", nargs="+", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    if given.stage:
        return run_stages(given.stage, given.out, given.smoke, given.seconds)
    if not given.smoke and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; --smoke checks the script without one")
    given.out.mkdir(parents=True, exist_ok=True)
    commit = given.commit or results.describe()["commit"]
    report = run_all(given.out, given.minutes, given.smoke, given.only, commit)
    for name in ("heads", "peers"):
        rows = [r for r in read_log(given.out / "rows.jsonl") if r["stage"] == name and "case" in r]
        print(results.text_table(rows))
    if given.record:
        print(record(report, given.out))
    bad = [n for n, r in report.items() if r["status"] != 0]
    print(f"stages not clean: {', '.join(bad) or 'none'}; everything is in {given.out}")
    return 0 if given.smoke or not bad else 1


if __name__ == "__main__":
    sys.exit(main())
