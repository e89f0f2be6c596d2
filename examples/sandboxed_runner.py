"""Runs untrusted programs on tests, each in a process of its own with limits.

    python examples/sandboxed_runner.py

The process is an isolated Python without the environment, in an empty folder. Before it reads the
program it gives up, for good unless it is root's: new file descriptors (so files, imports from disk
and sockets), new processes, memory and CPU seconds beyond a limit. The parent bounds the time on
the clock. A test's expected value never enters the process: values come out and the parent
compares. Run it as an ordinary user (root may raise its limits again), and on a machine of its own
where programs may be hostile and not just wrong.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

CHILD = """
import json, os, resource, sys
job = json.loads(sys.stdin.read())
out = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
os.close(null)
for name, most in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (most, most))
send, text, space = os.write, json.dumps, {}
try:
    exec(job["program"], space)
except BaseException:
    os._exit(1)
for arguments in job["arguments"]:
    try:
        line = text(space["f"](*arguments))
    except BaseException:
        line = "failed"
    send(out, (line + "\\n").encode())
os._exit(0)
"""


class Ran(NamedTuple):
    passed: list[int]  # 1 or 0 per test
    seconds: float  # of CPU, the start of the process among them


def run(
    program: str, tests: Sequence[tuple[Sequence[Any], Any]], *, cpu_seconds: int = 2,
    seconds: float = 20.0, megabytes: int = 256,
) -> Ran:  # fmt: skip
    """The program defines f; a test is (arguments, the value f must return), JSON both.

    A test passes with a value equal and of the same type. One that raises fails; at a limit the
    rest fail too.
    """
    limits = {
        "RLIMIT_CPU": cpu_seconds, "RLIMIT_AS": megabytes << 20, "RLIMIT_FSIZE": 1 << 16,
        "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": 0,
    }  # fmt: skip
    job = {"program": program, "arguments": [list(a) for a, _ in tests], "limits": limits}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CHILD], stdin=subprocess.PIPE, stdout=out,
            stderr=subprocess.DEVNULL, cwd=folder, env={}, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(json.dumps(job).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        lines = out.read().decode(errors="replace").splitlines()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines += ["failed"] * (len(tests) - len(lines))
    passed = [int(same(line, want)) for line, (_, want) in zip(lines, tests, strict=False)]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ran(passed, max(used, 0.0))


def same(line: str, want: Any) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return type(value) is type(want) and value == want


if __name__ == "__main__":
    add = [((1, 2), 3), ((2, 2), 4)]
    for body in ("return a + b", "return a * b", "while True: pass", "return open('x', 'w')"):
        print(f"{body:22}", run(f"def f(a, b):\n    {body}", add, cpu_seconds=1))
