"""Runs a folder of repro scripts and tells how each ends: `python tests/reports.py DIR [GLOB]`.

A script ends with status 0 where the right value or message came, 1 where not, 2 where it cannot be
tried here. What it printed last is shown where it was not right. `make
reports DIR=...` runs it; the status is 0 where no script ended with another than 0 or 2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WORDS = {0: "right", 1: "WRONG", 2: "not tried"}


def run(script: Path, limit: float) -> tuple[Path, int, str, float]:
    """(script, status, last lines, seconds); status 124 beyond `limit` seconds."""
    started = time.perf_counter()
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    try:
        done = subprocess.run(
            [sys.executable, script.name],
            cwd=script.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        status, text = done.returncode, done.stdout.strip() or done.stderr
    except subprocess.TimeoutExpired:
        status, text = 124, f"still running after {limit:g} s"
    return script, status, "\n".join(text.strip().splitlines()[-3:]), time.perf_counter() - started


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("pattern", nargs="?", default="h*.py", help="which scripts (default h*.py)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per script")
    options = parser.parse_args(argv)
    scripts = sorted(options.folder.glob(options.pattern))
    if not scripts:
        print(f"no {options.pattern} in {options.folder}", file=sys.stderr)
        return 2
    statuses = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for script, status, text, seconds in pool.map(lambda s: run(s, options.limit), scripts):
            statuses.append(status)
            word = WORDS.get(status, f"status {status}")
            print(f"{word:10s} {script.name}  ({seconds:.0f} s)", flush=True)
            if status not in (0, 2):
                print("    " + text.replace("\n", "\n    "), flush=True)
    right, tried = statuses.count(0), len(statuses) - statuses.count(2)
    print(f"{right} of {tried} right, {statuses.count(2)} not tried")
    return 0 if right == tried else 1


if __name__ == "__main__":
    sys.exit(main())
