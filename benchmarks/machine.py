"""What a row says about where it was measured: processor, instruction set, versions, commit."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def describe() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


@functools.cache
def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """Model with family and number, since cloud machines all call themselves "AMD EPYC"."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text()

    def value(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.M)
        return found.group(1).strip() if found else "?"

    count = len(re.findall(r"^processor\s*:", text, re.M))
    family = f"family {value('cpu family')} model {value('model')}"
    return f"{count}x {value('model name')} ({family})"


def _commit() -> str:
    """Commit of the checkout, "+" when files differ from it; empty outside git."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=10", "HEAD")
    return head + ("+" if head and git("status", "--porcelain") else "")
