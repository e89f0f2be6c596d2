"""The check of a wheel sees the faults that it is for."""

from __future__ import annotations

import shutil
import sysconfig
import zipfile
from pathlib import Path

import check_wheel
import pytest

import prefkern

PACKAGE = Path(prefkern.__file__).parent
TAG = f"cp{sysconfig.get_python_version().replace('.', '')}"
METADATA = "Requires-Dist: torch>=2.10\nRequires-Python: >=3.11\nLicense-Expression: Apache-2.0\n"

pytestmark = pytest.mark.skipif(
    shutil.which("nm") is None or not (PACKAGE / "_ops_cpu.so").exists(),
    reason="needs binutils and the native part",
)


def wheel(folder, *, platform="linux_x86_64", drop=(), add=None, metadata=METADATA):
    """A wheel of this installation's libraries, with or without something."""
    import platform as machine

    here = platform.replace("x86_64", machine.machine())
    path = folder / f"prefkern-0.1.0-{TAG}-{TAG}-{here}.whl"
    host = next(PACKAGE.glob("_C.*.so"))
    files = {"prefkern/_ops_cpu.so": PACKAGE / "_ops_cpu.so", f"prefkern/{host.name}": host}
    with zipfile.ZipFile(path, "w") as archive:
        for name, source in files.items():
            if name not in drop:
                archive.write(source, name)
        for name in ("prefkern/__init__.py", "prefkern/py.typed", "prefkern/kernels/tiles.py"):
            if name not in drop:
                archive.writestr(name, "")
        archive.writestr("prefkern-0.1.0.dist-info/METADATA", metadata)
        for name, source in (add or {}).items():
            archive.write(source, name)
    return path


def test_a_good_wheel_is_good(tmp_path, capsys):
    assert check_wheel.main([str(wheel(tmp_path))]) == 0
    assert "as it should be" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"drop": ("prefkern/_ops_cpu.so",)}, "prefkern/_ops_cpu.so is missing"),
        ({"drop": ("prefkern/py.typed",)}, "py.typed is missing"),
        ({"metadata": "Requires-Python: >=3.11\n"}, "METADATA lacks 'Requires-Dist: torch>=2.10'"),
        ({"add": {"prefkern/a.o": Path(__file__)}}, "prefkern/a.o does not belong in it"),
        (
            {"add": {"prefkern.libs/libtorch_cpu-1a2b.so": PACKAGE / "_ops_cpu.so"}},
            "torch's libraries were copied",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_wheel_is_told(tmp_path, capsys, fault, said):
    assert check_wheel.main([str(wheel(tmp_path, **fault))]) > 0
    assert said in capsys.readouterr().out


def test_a_library_with_foreign_names_is_told(tmp_path, capsys):
    """The host module under the op library's name asks for CPython."""
    host = next(PACKAGE.glob("_C.*.so"))
    made = wheel(tmp_path, drop=("prefkern/_ops_cpu.so",), add={"prefkern/_ops_cpu.so": host})
    assert check_wheel.main([str(made)]) > 0
    assert "_ops_cpu.so: asks for Py" in capsys.readouterr().out


def test_a_wrong_name_is_told(tmp_path):
    path = tmp_path / "prefkern-0.1.0-cp311-cp312-linux_x86_64.whl"
    path.write_bytes(b"")
    assert "the name is not" in check_wheel.check(path)[0]
