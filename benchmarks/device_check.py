"""One command for a machine with a GPU: build, test, time, write JSON.

    python -m benchmarks.device_check --out results/

Stages run in processes of their own, each with a share of --minutes (9 by default): a stage that
crashes or runs out of time is recorded as such and the others still run. `--smoke` runs the same
code on tiny CPU inputs (Triton's interpreter, no timing worth reading), so that the script itself
is tested without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    out: Path
    smoke: bool
    seconds: float  # of this stage

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"


def run_command(command: list[str], seconds: float, **environment: str) -> dict:
    """Status, seconds and the end of the output of a command."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1),
            env={**os.environ, **environment}, check=False,
        )  # fmt: skip
        status, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        status, text = "out of time", str(late.stdout or b"")[-4000:]
    except FileNotFoundError:
        status, text = "missing", f"{command[0]} is not on this machine"
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "tail": text[-4000:]}


# ---- stages --------------------------------------------------------------------------------------
def machine(options: Options) -> dict:
    import torch

    from prefkern.backends import choice
    from prefkern.backends.contract import Problem

    from .device import timing

    commit = run_command(["git", "rev-parse", "--short", "HEAD"], 10)
    found = {
        "date": date.today().isoformat(), "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit["tail"].strip() if commit["status"] == 0 else None,
    }  # fmt: skip
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    dtype = torch.bfloat16
    found["backends"] = {
        name: choice.unsupported(name, Problem("linear_logps", options.device, dtype))
        for name in choice.backend_names()
    }
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name, "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": run_command(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 20
            )["tail"].strip(),
            "copy_tb_per_s": timing.copy_bandwidth() / 1e12,
            "bf16_product_tflops": timing.product_rate() / 1e12,
        }  # fmt: skip
    return {"status": 0, "found": found}


def build(options: Options) -> dict:
    """Compiles the extension for this card alone."""
    if options.smoke:
        return {"status": "left out of a smoke run"}
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}" + ("a" if major == 9 else "")
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q"]
    return run_command([*install, "-e", "."], options.seconds, PREFKERN_CUDA_ARCHS=arch)


def tests(options: Options) -> dict:
    folder = "tests/device" if not options.smoke else "tests/test_env.py"
    return run_command(
        [sys.executable, "-m", "pytest", "-q", "--maxfail=20", folder], options.seconds
    )


def sanitizer(options: Options) -> dict:
    """A small run of every kernel under compute-sanitizer; without it (smoke), the run alone."""
    small = [sys.executable, "-m", "benchmarks.device.small"]
    if options.smoke:
        return run_command([*small, "triton", "cpu"], options.seconds, TRITON_INTERPRET="1")
    from prefkern.backends import choice
    from prefkern.backends.contract import Problem

    problem = Problem("linear_logps", "cuda", __import__("torch").bfloat16)
    names = [n for n in ("cuda", "triton") if not choice.unsupported(n, problem)]
    runs = [(tool, name) for name in names for tool in ("memcheck", "racecheck", "initcheck")]
    found = {}
    for tool, name in runs:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small, name]
        found[f"{tool} {name}"] = run_command(command, options.seconds / len(runs))
    bad = [key for key, run in found.items() if run["status"] != 0]
    return {"status": f"not clean: {bad}" if bad else 0, "runs": found}


def epilogues(options: Options) -> dict:
    if options.smoke:
        return {"status": "needs a GPU's events"}
    import torch

    from .device import kernels

    dtypes = (torch.bfloat16, torch.float32)
    return {"status": 0, "rows": kernels.measure_epilogues(dtypes, kernels.ROWS, kernels.COLUMNS)}


def lists(options: Options) -> dict:
    if options.smoke:
        return {"status": "needs a GPU's events"}
    from .device import kernels

    return {"status": 0, "rows": kernels.measure_lists(100_000, 1000)}


def heads(options: Options) -> dict:
    from .device import cases, head

    deadline = time.monotonic() + options.seconds
    chosen = cases.TINY_CASES if options.smoke else cases.CASES
    rows: list[dict] = []
    left_out = []
    for case in chosen:
        if time.monotonic() > deadline - 10 and not options.smoke:
            left_out.append(case.name)
            continue
        rows += head.measure_case(case, options.device, 3 if options.smoke else 7, deadline)
        # written after every case: what a later crash cannot take away
        write(options.out / "heads.partial.json", rows)
    bad = [
        f"{r['variant']} on {r['case']}: {r['status']}"
        for r in rows
        if r["variant"].startswith("prefkern") and r["status"].startswith(("wrong", "failed"))
    ]
    return {"status": "; ".join(bad) or 0, "rows": rows, "left_out": left_out}


# name -> (function, share of the time)
STAGES: dict[str, tuple[Callable[[Options], dict], float]] = {
    "build": (build, 0.20),
    "machine": (machine, 0.04),
    "tests": (tests, 0.26),
    "heads": (heads, 0.28),
    "epilogues": (epilogues, 0.06),
    "lists": (lists, 0.06),
    "sanitizer": (sanitizer, 0.10),
}


# ---- running them --------------------------------------------------------------------------------
def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, default=str) + "\n")


def run_all(out: Path, minutes: float, smoke: bool, only: list[str]) -> dict[str, dict]:
    """Every stage in its process; time that a stage leaves goes to those after it."""
    end = time.monotonic() + 60 * minutes
    shares = {name: STAGES[name][1] for name in only}
    report: dict[str, dict] = {}
    for place, name in enumerate(only):
        later = sum(shares[n] for n in only[place + 1 :])
        seconds = (end - time.monotonic()) * shares[name] / (shares[name] + later)
        file = out / f"{name}.json"
        file.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "benchmarks.device_check", "--stage", name, "--out", str(out),
            "--seconds", f"{seconds:.0f}", *(["--smoke"] if smoke else []),
        ]  # fmt: skip
        environment = {"TRITON_INTERPRET": "1"} if smoke else {}
        ran = run_command(command, seconds + 5, **environment)
        report[name] = json.loads(file.read_text()) if file.exists() else ran
        report[name]["stage_seconds"] = ran["seconds"]
        print(f"{name}: {report[name]['status']} ({ran['seconds']} s)", flush=True)
        write(out / "device_check.json", report)
    return report


def summary(report: dict[str, dict]) -> str:
    """The head table in a form to read; the JSON holds the rest."""
    lines = []
    for row in report.get("heads", {}).get("rows", []):
        number = f"{row['ms']:9.2f} ms" if "ms" in row else " " * 12
        ratio = f"{row['over_bare']:6.2f}x" if "over_bare" in row else " " * 7
        memory = f"{row['beyond_mib']:8.0f} MiB" if "beyond_mib" in row else " " * 12
        lines.append(
            f"{row['case']:38} {row['variant']:28} {number} {ratio} {memory} {row['status']}"
        )
    return "\n".join(lines)


def record(report: dict[str, dict], file: Path) -> str:
    """Enters the GPU and the commit of a clean run for every CUDA kernel in `file`, which is what
    lets automatic choice take the backend; says what was done or why not."""
    found = report.get("machine", {}).get("found", {})
    unclean = [n for n in ("tests", "sanitizer") if report.get(n, {}).get("status") != 0]
    served = found.get("backends", {}).get("cuda") == []
    if unclean or not served or not found.get("gpu") or not found.get("commit"):
        why = f"not clean: {', '.join(unclean)}" if unclean else "the cuda backend was not on"
        return f"nothing recorded ({why})"
    ran = {"gpu": found["gpu"], "commit": found["commit"]}
    kernels = dict.fromkeys(json.loads(file.read_text()), ran)
    file.write_text(json.dumps(kernels, indent=2) + "\n")
    return f"{len(kernels)} kernels recorded as run on {ran['gpu']} at {ran['commit']}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--smoke", action="store_true", help="tiny inputs on the CPU")
    parser.add_argument(
        "--record", action="store_true", help="enter a clean run in prefkern/cuda_ran_on.json"
    )
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.stage:
        found = STAGES[given.stage][0](Options(given.out, given.smoke, given.seconds))
        write(given.out / f"{given.stage}.json", found)
        return 0
    if not given.smoke:
        import torch

        if not torch.cuda.is_available():
            parser.error("no GPU is visible to torch; --smoke checks the script without one")
    report = run_all(given.out, given.minutes, given.smoke, given.only)
    print(summary(report))
    if given.record:
        print(record(report, ROOT / "prefkern/cuda_ran_on.json"))
    bad = [n for n, r in report.items() if r["status"] != 0]
    print(f"stages not clean: {', '.join(bad) or 'none'}; full numbers in {given.out}")
    return 0 if given.smoke or not bad else 1


if __name__ == "__main__":
    sys.exit(main())
