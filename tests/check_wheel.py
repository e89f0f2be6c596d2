"""Checks a built wheel as a release has it: python tests/check_wheel.py WHEEL [--run].

Name and tag, what is in it, what its libraries link and ask of the system, and with --run that the
installed package computes. Every fault is printed; the exit status is their number.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = re.compile(
    r"prefkern-(?P<version>[\w.]+)-(?:py3-none-any|(?P<tag>cp3\d+)-(?P=tag)-(?P<platform>\w+))\.whl"
)
NATIVE = {"prefkern/_ops_cpu.so"}
FOREIGN = re.compile(r"\b(at|c10|torch|caffe2)::|^_?Py[A-Z_]")  # torch's C++ names and CPython's
LINKED = re.compile(r"lib(torch_cpu|stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so|ld-linux")
MOST_GLIBC = (2, 28)  # of manylinux_2_28
MOST_BYTES = 20 << 20


def main(arguments: list[str]) -> int:
    wheel = Path(next(a for a in arguments if a.endswith(".whl")))
    faults = [*check(wheel)]
    if "--run" in arguments:
        faults += run()
    for fault in faults:
        print(f"{wheel.name}: {fault}")
    if not faults:
        print(f"{wheel.name}: as it should be, {wheel.stat().st_size >> 10} KiB")
    return len(faults)


def check(wheel: Path) -> list[str]:
    """What is wrong with a wheel, in words."""
    match = NAME.fullmatch(wheel.name)
    if match is None:
        return ["the name is not prefkern-VERSION-cp3XY-cp3XY-PLATFORM.whl or ...-py3-none-any.whl"]
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = set(archive.namelist())
        info = f"prefkern-{match['version']}.dist-info"
        faults = _contents(names, info, archive, native=match["tag"] is not None)
        if wheel.stat().st_size > MOST_BYTES:
            faults.append(f"{wheel.stat().st_size >> 20} MiB, more than {MOST_BYTES >> 20}")
        for name in sorted(n for n in names if n.endswith(".so")):
            path = Path(archive.extract(name, folder))
            faults += [f"{name}: {fault}" for fault in _library(path, match["platform"] or "")]
    faults += _audit(wheel, match["platform"] or "")
    return faults


def _contents(names: set[str], info: str, archive: zipfile.ZipFile, native: bool) -> list[str]:
    faults = []
    wanted = {"prefkern/__init__.py", "prefkern/py.typed", "prefkern/kernels/tiles.py"}
    faults += [
        f"{name} is missing" for name in sorted((wanted | (NATIVE if native else set())) - names)
    ]
    libraries = {n for n in names if n.endswith(".so")}
    host = {n for n in libraries if re.match(r"prefkern/_C\.(cpython|abi3)", n)}
    if native and len(host) != 1:
        faults.append(f"one host module prefkern/_C is expected, got {sorted(host)}")
    if not native and libraries:
        faults.append(f"a pure wheel holds {sorted(libraries)}")
    bad = [n for n in names if re.search(r"\.(o|cpp|h|cu|cuh)$|(^|/)(tests|benchmarks)/", n)]
    faults += [f"{name} does not belong in it" for name in sorted(bad)]
    if any("torch" in n.rsplit("/", 1)[-1] and n.endswith(".so") for n in names):
        faults.append("torch's libraries were copied into it")
    metadata = archive.read(f"{info}/METADATA").decode() if f"{info}/METADATA" in names else ""
    for line in ("Requires-Dist: torch>=2.10", "Requires-Python: >=3.11", "License-Expression:"):
        if line not in metadata:
            faults.append(f"METADATA lacks {line!r}")
    return faults


def _library(path: Path, platform: str) -> list[str]:
    """What is wrong with a shared library, by binutils."""
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        return ["binutils (nm, readelf) are needed to check it"]
    host = path.name.startswith("_C.")  # the one module that talks to CPython
    listed = _tool("nm", "--dynamic", "--demangle", "--undefined-only", str(path)).splitlines()
    undefined = [line.split(" U ", 1)[-1].strip() for line in listed]
    foreign = [
        n for n in undefined if FOREIGN.search(n) and not (host and n.startswith(("Py", "_Py")))
    ]
    faults = [f"asks for {name}" for name in foreign[:5]]
    needed = re.findall(r"NEEDED.*\[(.+)\]", _tool("readelf", "--dynamic", str(path)))
    faults += [f"links {name}" for name in needed if not LINKED.match(name)]
    versions = {
        tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_(\d+\.\d+)", "\n".join(listed))
    }
    if platform.startswith("manylinux") and versions and max(versions) > MOST_GLIBC:
        faults.append(f"needs glibc {'.'.join(map(str, max(versions)))}")
    machine = re.search(r"Machine: +(.*)", _tool("readelf", "--file-header", str(path)))
    arch = {"x86_64": "X86-64", "aarch64": "AArch64"}.get(
        platform.rsplit("linux_", 1)[-1].split("_", 2)[-1]
    )
    if arch and machine and arch not in machine[1]:
        faults.append(f"is for {machine[1]}")
    return faults


def _audit(wheel: Path, platform: str) -> list[str]:
    """auditwheel's word on a wheel that says manylinux; without auditwheel nothing is said."""
    if not platform.startswith("manylinux") or shutil.which("auditwheel") is None:
        return []
    told = _tool("auditwheel", "show", str(wheel))
    tags = platform.split(".")
    return (
        [] if any(tag in told for tag in tags) else [f"auditwheel says otherwise: {told.strip()}"]
    )


def _tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def run() -> list[str]:
    """Whether the installed package computes on its native backend."""
    code = """
import torch, prefkern
from prefkern.cli import env_report
on = [b["name"] for b in env_report.collect()["backends"] if b["on"]]
h = torch.randn(8, 16, requires_grad=True)
w, t = torch.randn(50, 16, requires_grad=True), torch.randint(0, 50, (8,))
logp = prefkern.linear_logps(h, w, t, backend="cpu").logp
torch.testing.assert_close(logp, (h @ w.T).log_softmax(-1)[range(8), t], rtol=1e-4, atol=1e-5)
logp.sum().backward()
assert w.grad.isfinite().all() and "cpu" in on, on
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 else [f"does not run: {done.stderr.strip()[-600:]}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
