"""Plants the faults of tables/*.py, one at a time, in a copy of the package and expects red tests.

    python tests/planted_faults/mutants.py [--list] [--jobs N] [name ...]

Every row of a table is a textual change of one file and the tests that must notice it. A row that
no longer applies (its text is gone, or stands there twice) or whose tests do not run is an error,
not a catch. What the package stands on is imported once: each fault gets a fork, whose `prefkern`
is the changed copy.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GREEN, RED = 0, 1  # pytest's exit codes; any other is no verdict
LONGEST = 900  # seconds of one fault: one that loops for ever is no verdict either
# In the changed copy: Python reads it as it starts. PYTHONPATH alone would lose to the folder that
# `python -c` and `python -m` put first, which is the repository; its folder kernels/ is not the
# package of that name.
SITE = """import sys
from importlib.machinery import PathFinder


class Copy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{folder!r}]) if name == "prefkern" else None


sys.meta_path.insert(0, Copy)
sys.modules["kernels"] = None
"""
WHERE = "import importlib.util as u; print(u.find_spec('prefkern').origin)"


class Mutant(NamedTuple):
    """One planted fault."""

    name: str
    file: str  # from the root of the repository, below prefkern/
    old: str  # stands there exactly once
    new: str
    tests: tuple[str, ...]  # what pytest is given; at least one test must fail


def table() -> list[Mutant]:
    """The rows of all tables, in the order of their files."""
    rows: list[Mutant] = []
    for path in sorted((HERE / "tables").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"mutants_of_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        rows += [Mutant(*row[:4], row[4:]) for row in module.MUTANTS]
    names = [row.name for row in rows]
    assert len(set(names)) == len(names), "two rows have one name"
    return rows


def apply(row: Mutant, root: Path) -> None:
    """Plants the fault below `root`.

    Raises:
        ValueError: the text is not there exactly once, the change is none or is no Python.
    """
    path = root / row.file
    text = path.read_text(encoding="utf-8")
    if text.count(row.old) != 1 or row.old == row.new:
        raise ValueError(
            f"{row.name}: its text must stand in {row.file} exactly once and be changed, found it "
            f"{text.count(row.old)} times; mend the row."
        )
    text = text.replace(row.old, row.new)
    compile(text, row.file, "exec")
    path.write_text(text, encoding="utf-8")


def verdict(row: Mutant | None, tests: Iterable[str], folder: Path) -> int:
    """pytest's exit code on a copy of the package with the fault, or without any."""
    copy = folder / "package"
    # times are kept, so that what Python compiled before serves again
    shutil.copytree(ROOT / "prefkern", copy / "prefkern")
    if row is not None:
        apply(row, copy)
    sys.path.insert(0, str(copy))
    (copy / "sitecustomize.py").write_text(SITE.format(folder=str(copy)), encoding="utf-8")
    os.environ["PYTHONPATH"] = str(copy)  # tests that start ranks or commands see the copy too
    import prefkern

    os.chdir(ROOT)
    started = subprocess.check_output([sys.executable, "-c", WHERE], text=True).strip()
    assert str(prefkern.__file__) == started == str(copy / "prefkern" / "__init__.py"), started
    import pytest

    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests]))


def start(row: Mutant | None, tests: Iterable[str], folder: Path) -> int:
    """Forks; the child's output goes to folder/log and its exit code is pytest's."""
    folder.mkdir()
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    os.setsid()  # with what it starts it can be ended as one group
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = verdict(row, tests, folder)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(rows: list[Mutant], jobs: int, base: Path) -> Iterator[tuple[str, int, float, str]]:
    """(name, exit code, seconds, output) of each row as it ends; "" is the package as it is."""
    waiting: list[Mutant | None] = [None, *rows]
    running: dict[int, tuple[str, float, Path]] = {}
    begun = 0
    every = list(dict.fromkeys(test for row in rows for test in row.tests))
    while waiting or running:
        while waiting and len(running) < jobs:
            row = waiting.pop(0)
            name = "" if row is None else row.name
            folder, begun = base / f"{begun}", begun + 1
            child = start(row, every if row is None else row.tests, folder)
            running[child] = (name, time.monotonic(), folder)
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            time.sleep(0.05)
            late = [pid for pid, (_, t, _) in running.items() if time.monotonic() - t > LONGEST]
            for pid in late:
                os.killpg(pid, signal.SIGKILL)
            continue
        name, began, folder = running.pop(child)
        log = (folder / "log").read_text(encoding="utf-8", errors="replace")
        shutil.rmtree(folder)
        yield name, os.waitstatus_to_exitcode(status), time.monotonic() - began, log


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("names", nargs="*", help="rows to plant; default all")
    parser.add_argument("--list", action="store_true", help="print the rows and plant none")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args(arguments)
    rows = table()
    if unknown := set(options.names) - {row.name for row in rows}:
        parser.error(f"no rows of the names {sorted(unknown)}")
    rows = [row for row in rows if not options.names or row.name in options.names]
    if options.list:
        for row in rows:
            print(f"{row.name:44s} {row.file}: {' '.join(row.tests)}")
        return 0
    for variable in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        os.environ.pop(variable, None)
    os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    for name in ("torch", "scipy", "hypothesis", "datasets", "accelerate", "peft", "pytest"):
        importlib.import_module(name)
    importlib.import_module("transformers.models.llama.modeling_llama")

    bad = 0
    with tempfile.TemporaryDirectory(prefix="prefkern_mutants_") as base:
        for name, code, seconds, log in run(rows, options.jobs, Path(base)):
            if name:
                word = {RED: "caught", GREEN: "LIVES"}.get(code, f"exit {code}: no verdict")
            else:
                word = "green" if code == GREEN else f"exit {code}: its tests are not green"
            print(f"{name or 'the package as it is':44s} {word:7s} {seconds:6.1f} s", flush=True)
            if code != (RED if name else GREEN):
                bad += 1
                print("    " + "\n    ".join(log.strip().split("\n")[-12:]))
    print(f"{len(rows) - bad} of {len(rows)} planted faults were noticed")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
