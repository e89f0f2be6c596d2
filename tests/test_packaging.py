"""Wheel and sdist content, the pure wheel, symbols of the op library, imports."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from cuda_library import NO_NVCC, cuda_library
from packaging.requirements import Requirement
from packaging.version import Version

import prefkern

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(prefkern.__file__).parent
OP_LIBRARY = PACKAGE / "_ops_cpu.so"
NOT_SOURCE = ("__pycache__", "*.so", "*.egg-info", "_build.json", ".*_cache", ".venv*", ".git")

needs_native = pytest.mark.skipif(
    not OP_LIBRARY.exists(), reason="prefkern was installed without the native part"
)


def copy_tree(target: Path, *, objects: bool = False) -> Path:
    """The sources as a fresh checkout has them; with `objects`, compiled files come along."""
    ignore = shutil.ignore_patterns(*NOT_SOURCE, "build", "dist", "runs", "results")
    shutil.copytree(ROOT, target, ignore=ignore)
    if objects:
        for folder in ROOT.glob("build/native-*"):
            shutil.copytree(folder, target / "build" / folder.name)
    return target


def build(tree: Path, kind: str, before: str = "", **environment: str) -> Path:
    """Calls setuptools' build hook as pip does without isolation; returns the wheel or sdist."""
    code = f"{before}\nimport setuptools.build_meta as b; print(b.build_{kind}('dist'))"
    ours = ("PREFKERN_NO_EXT", "PREFKERN_NO_CUDA", "PREFKERN_CUDA_ARCHS", "CXX", "CXXFLAGS")
    keep = {k: v for k, v in os.environ.items() if k not in ours}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**keep, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(result.stdout[-2000:] + result.stderr[-2000:])
    return tree / "dist" / result.stdout.split()[-1]


def run_python(code: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def package_files(tree: Path) -> set[str]:
    """Names that a pure wheel must hold, read from the source tree."""
    names = {
        path.relative_to(tree).as_posix()
        for pattern in ("*.py", "*.pyi", "py.typed", "cuda_ran_on.json")
        for path in (tree / "prefkern").rglob(pattern)
    }
    kernels = {f"prefkern/kernels/{path.name}" for path in (tree / "kernels").glob("*.py")}
    return names | kernels | {"prefkern/_build.json"}


def wheel_content(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("checkout") / "prefkern")


@pytest.fixture(scope="module")
def pure_wheel(tree):
    # A PATH that holds no compiler; ninja and pybind11 are found beside the interpreter.
    return build(tree, "wheel", PATH=str(tree / "nothing"))


@pytest.fixture(scope="module")
def pure_install(pure_wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pure")
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(folder)
    return folder


# ---- wheels and sdist ---------------------------------------------------------------------------


def test_wheel_without_a_compiler_is_pure(tree, pure_wheel):
    assert pure_wheel.name == f"prefkern-{prefkern.__version__}-py3-none-any.whl"
    assert wheel_content(pure_wheel) == package_files(tree)


def test_wheel_metadata(pure_wheel):
    info = f"prefkern-{prefkern.__version__}.dist-info"
    with zipfile.ZipFile(pure_wheel) as archive:
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    needed = {x.split(": ")[1] for x in re.findall(r"^Requires-Dist: [^;\n]+$", metadata, re.M)}
    assert needed == {"torch>=2.10", "numpy>=1.26"}
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "prefkern = prefkern.cli.main:main" in scripts
    assert "Apache License" in licence and len(licence) > 11_000


def test_pure_wheel_runs_on_the_reference_backend(pure_install):
    code = f"""
import sys
# An editable install would lend the pure copy the compiled module that it lacks.
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
sys.path.insert(0, {str(pure_install)!r})
sys.modules["triton"] = None  # as if it were not installed
import torch, prefkern
assert prefkern.__file__.startswith({str(pure_install)!r}), prefkern.__file__
h, w = torch.randn(4, 8), torch.randn(16, 8, requires_grad=True)
t = torch.tensor([1, 2, -100, 3])
logp = prefkern.linear_logps(h, w, t).logp
logp.sum().backward()
assert logp[2] == 0 and w.grad.isfinite().all()
try:
    prefkern.linear_logps(h, w, t, backend="cpu")
except ValueError as error:
    print(error)
from prefkern.cli import env_report as diagnostics
print(diagnostics.format_text(diagnostics.collect()))
"""
    out = run_python(code, pure_install)
    assert "no C++ compiler (c++, g++ or clang++) was found; install g++" in out
    assert "eager      on for cpu" in out
    assert re.search(r"^  cpu +off$", out, re.M), out


def test_build_without_torch_says_how_to_get_the_native_part(tree):
    # What pip's build isolation looks like from inside.
    wheel = build(tree, "wheel", before="import sys; sys.modules['torch'] = None")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert b"pip install --no-build-isolation" in archive.read("prefkern/_build.json")


def test_no_ext_variable_gives_a_pure_wheel(tree):
    wheel = build(tree, "wheel", PREFKERN_NO_EXT="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert b"PREFKERN_NO_EXT was set" in archive.read("prefkern/_build.json")


def test_a_failing_compile_is_an_error(tmp_path):
    if not OP_LIBRARY.exists():
        pytest.skip("needs the compiler that builds the native part")
    broken = copy_tree(tmp_path / "prefkern")
    (broken / "csrc/host.cpp").write_text("#error planted\n")
    with pytest.raises(RuntimeError, match="planted"):
        build(broken, "wheel", PREFKERN_NO_CUDA="1")


@needs_native
def test_native_wheel(tmp_path):
    tree = copy_tree(tmp_path / "prefkern", objects=True)  # object files are reused by ninja
    wheel = build(tree, "wheel", PREFKERN_NO_CUDA="1")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-linux_" in wheel.name
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    libraries = {f"prefkern/_C{suffix}", "prefkern/_ops_cpu.so"}
    assert wheel_content(wheel) == package_files(tree) | libraries
    with zipfile.ZipFile(wheel) as archive:
        assert "prefkern/_ops_cuda.so" not in archive.namelist()
        record = json.loads(archive.read("prefkern/_build.json"))
    assert record["native"] and not record["cuda"] and record["cuda_archs"] == []
    assert "PREFKERN_NO_CUDA was set" in record["cuda_reason"]


@needs_native
def test_a_missing_and_a_broken_nvcc_are_told_apart(tmp_path):
    """Not there, or not able to compile an empty kernel: a reason. A bad list of GPUs: an error."""
    for script, reason in (
        (None, "nvcc was not found when prefkern was built"),
        ("#!/bin/sh\necho 'fatal error: no such GPU' >&2\nexit 1\n", "fatal error: no such GPU"),
    ):
        code = (ROOT / "setup.py").read_text()
        head = code[: code.index("\nsetup(")].replace("Path(__file__)", f"Path({str(ROOT)!r}, 'x')")
        program = tmp_path / "nvcc"
        if script is None:
            head = head.replace('return shutil.which("nvcc")', 'return shutil.which("no-nvcc")')
            head = head.replace("/usr/local/cuda/bin", "/nowhere")
        else:
            program.write_text(script)
            program.chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        asked = {"PATH": path, "CUDA_HOME": "", "PREFKERN_CUDA_ARCHS": "sm_80"}
        out = run_python(head + "\nprint(CUDA_REASON)", tmp_path, **asked)
        assert reason in out, out


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_no_cuda_library_for_a_torch_without_cuda_unless_asked_for(tmp_path):
    """It could not be loaded, and costs a minute of nvcc."""
    code = (ROOT / "setup.py").read_text()
    head = code[: code.index("\nsetup(")].replace("Path(__file__)", f"Path({str(ROOT)!r}, 'x')")
    out = run_python(head + "\nprint(CUDA_REASON)", tmp_path, PREFKERN_CUDA_ARCHS="")
    assert "has no CUDA" in out and "PREFKERN_CUDA_ARCHS" in out, out


def test_sdist_is_complete(tree, tmp_path):
    sdist = build(tree, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"prefkern-{prefkern.__version__}"
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    sources = {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*.[ch]*")}
    assert sources and sources <= held
    assert {"setup.py", "kernels/__init__.py", "tests/conftest.py", "Makefile"} <= held
    assert not [name for name in held if name.endswith((".so", ".o", "_build.json"))]
    wheel = build(unpacked, "wheel", PREFKERN_NO_EXT="1")
    assert wheel_content(wheel) == package_files(tree)


# ---- imports ------------------------------------------------------------------------------------


def test_import_is_light(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import prefkern
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"transformers", "datasets", "peft", "accelerate", "matplotlib", "tyro", "yaml"}
lazy = {"prefkern._C", "prefkern.kernels", "prefkern.train"}
print(sorted(new & heavy), sorted(lazy & set(sys.modules)))
"""
    assert run_python(code, tmp_path).split() == ["[]", "[]"]


def test_import_with_the_extension_switched_off(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch, prefkern
from prefkern.cli import env_report as diagnostics
logp = prefkern.linear_logps(torch.randn(4, 8), torch.randn(16, 8), torch.zeros(4).long()).logp
assert logp.shape == (4,) and "prefkern._C" not in sys.modules
on = [b["name"] for b in diagnostics.collect()["backends"] if b["on"]]
print(on, diagnostics.host_module()[1])
"""
    out = run_python(code, tmp_path, PREFKERN_NO_EXT="1", PREFKERN_BACKEND="")
    assert out.strip() == "['eager'] PREFKERN_NO_EXT is set; unset it"


def test_kernels_folder_refuses_to_be_the_other_package():
    code = """
import sys
sys.path.insert(0, ".")
try:
    import kernels
except ImportError as error:
    print("refused:", error)
import prefkern.kernels
"""
    out = run_python(code, ROOT)
    assert out.startswith("refused: this `kernels` folder holds the sources of prefkern.kernels")


# ---- the op library -----------------------------------------------------------------------------


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_native
@pytest.mark.parametrize("name", ["_ops_cpu", "_ops_cuda"])
def test_op_library_has_no_torch_cpp_and_no_python_symbol(name):
    library = OP_LIBRARY if name == "_ops_cpu" else cuda_library()
    if library is None:
        pytest.skip(NO_NVCC)
    lines = tool("nm", "--dynamic", "--demangle", str(library)).splitlines()
    undefined = [line.split(" U ", 1)[1] for line in lines if " U " in line]
    assert any("torch_call_dispatcher" in name for name in undefined)  # the stable C interface
    # torch's C++ names live in these namespaces, CPython's start with Py or _Py.
    bad = [x for x in undefined if re.match(r"(.*\b(at|c10|torch|caffe2)::|_?Py[A-Z_])", x)]
    assert bad == []
    assert [line for line in lines if "PyInit" in line] == []


@needs_native
def test_op_library_links_no_second_openmp_and_no_python():
    needed = re.findall(r"NEEDED.*\[(.+)\]", tool("readelf", "--dynamic", str(OP_LIBRARY)))
    assert "libtorch_cpu.so" in needed
    allowed = r"lib(torch_cpu|stdc\+\+|gcc_s|m|c|c\+\+|c\+\+abi)\.so|ld-linux"
    assert [name for name in needed if not re.match(allowed, name)] == []


def test_cuda_library_needs_torch_and_the_c_library_alone():
    """The CUDA runtime is inside; libtorch_cuda is torch's own, which a CUDA build has loaded."""
    if cuda_library() is None:
        pytest.skip(NO_NVCC)
    needed = re.findall(r"NEEDED.*\[(.+)\]", tool("readelf", "--dynamic", str(cuda_library())))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    allowed = r"lib(torch_cpu|torch_cuda|stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so|ld-linux"
    assert [name for name in needed if not re.match(allowed, name)] == []


@needs_native
def test_kernels_of_every_machine_are_linked_first():
    """An inline function defined in several objects is taken from the first one: it must not be the
    copy compiled for AVX-512."""
    scripts = [path.read_text() for path in ROOT.glob("build/native-*/build.ninja")]
    links = [re.search(r"^build _ops_cpu\.so: link (.*)$", text, re.M) for text in scripts]
    if not any(links):
        pytest.skip("prefkern was not built in this tree")
    for link in filter(None, links):  # a folder may hold the CUDA library alone
        special = [bool(re.search("kernels_(?!baseline)", name)) for name in link[1].split()]
        assert special == sorted(special)


# ---- sources ------------------------------------------------------------------------------------


def cross_sources() -> list[Path]:
    files = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    return [f for f in sorted(files) if not re.match("kernels_(?!baseline)", f.stem)]


@pytest.mark.parametrize("source", cross_sources(), ids=lambda f: f.stem)
def test_compiles_for_aarch64(source, tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("needs the cross compiler: apt-get install g++-aarch64-linux-gnu")
    pybind11 = pytest.importorskip("pybind11")
    names = ("CXX", "CXX_FLAGS", "ISA_VARIANTS", "ISA_FLAGS", "BUILD_TORCH", "TORCH_TARGET")
    command = [
        *(compiler, "-std=c++20", "-O0", "-c", str(source), "-o", str(tmp_path / "out.o")),
        *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
        *(f'-DPREFKERN_{name}="test"' for name in names),
        *("-DPREFKERN_ISA_BASELINE=1", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *("-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")),
        *("-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("name", ["test", "bench"])
def test_pins_satisfy_the_declared_ranges(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    wanted += [
        x for extra in {"test": ("train", "test"), "bench": ("bench",)}[name] for x in extras[extra]
    ]
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    pairs = [line.partition(" ;")[0].lower().replace("_", "-") for line in lines if "==" in line]
    pins = dict(pair.split("==") for pair in pairs)
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name == "torch":
            continue  # chosen by TORCH_SPEC
        assert Version(pins[requirement.name]) in requirement.specifier, text


def test_continuous_integration_runs_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    commands = script.read_text().splitlines()[-3:]
    assert commands[:2] == ["make test", "make docs"]
    assert commands[2].startswith("exec make test-integrations")
