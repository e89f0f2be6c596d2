"""Builds the native part: the host module prefkern._C, the CPU op library prefkern/_ops_cpu.so and,
where torch has CUDA and nvcc is at hand, the CUDA op library prefkern/_ops_cuda.so.

pyproject.toml holds the metadata. What can keep the native part from being built (no compiler, no
torch, PREFKERN_NO_EXT) gives a pure wheel, tagged py3-none-any, that carries the reason in
prefkern/_build.json for `prefkern env` to print, as does the lack of nvcc. A compiler that works
and then fails on our sources is an error.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OLDEST_TORCH = (2, 10)
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10

# csrc/cpu/kernels_<isa>.cpp is compiled with these flags and nothing else is. The order is the link
# order: an inline function that several objects define is taken from the first one, so it must come
# from the object that every machine can run.
X86_ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "avx512bf16": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
        *("-mavx2", "-mfma", "-mf16c"),
    ],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = X86_ISA_FLAGS if IS_X86 else {"baseline": []}

# No -fopenmp: threads come from torch's own pool; a second OpenMP runtime would fight it.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-DNDEBUG"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    # errno and FP traps are never read here; both block vectorisation of sqrt and of selects.
    *("-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"),
]
# Machine code for these, and PTX of the newest for GPUs to come.
CUDA_ARCHS = "sm_80,sm_90a,sm_100"
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-DNDEBUG", "-Xfatbin=-compress-all"),
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden",
]
LINK_FLAGS = ["-shared", "-Wl,--as-needed", "-Wl,-z,relro", "-Wl,-z,now"]


def torch_folder() -> Path | None:
    """The folder of the installed torch, found without importing it (which takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def ninja_program() -> str | None:
    beside_python = Path(sysconfig.get_path("scripts")) / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")


def compiler() -> list[str] | None:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else [found]


def try_compiler(cxx: list[str]) -> str | None:
    """The reason why `cxx` cannot build a Python module, or None when it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <span>\n#include <vector>\nint probe;\n")
        flags = ["-std=c++20", f"-I{sysconfig.get_path('include')}", "-fsyntax-only"]
        command = [*cxx, *flags, str(source)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"the C++ compiler {shlex.join(cxx)} cannot be started ({error})"
    if result.returncode != 0:
        first_error = next((x for x in result.stderr.splitlines() if "error" in x), result.stderr)
        return (
            f"the C++ compiler {shlex.join(cxx)} fails on a C++20 file that includes Python.h "
            f"({first_error.strip()}); install g++ 11 or newer and the Python development headers"
        )
    return None


def why_not_native() -> str | None:
    """The reason for building the pure wheel, or None when the native part can be built."""
    if os.environ.get("PREFKERN_NO_EXT", "0") not in ("", "0"):
        return "PREFKERN_NO_EXT was set when prefkern was installed; unset it and install again"
    if sys.platform != "linux":
        return f"the native part is built on Linux only, and this is {sys.platform}"
    folder = torch_folder()
    if folder is None:
        return (
            "torch was not importable when prefkern was built (pip isolates builds by default); "
            "install torch first and then use pip install --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(x) for x in version.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {version} was installed when prefkern was built; 2.10 or newer is needed"
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        return f"torch in {folder} has no C++ headers; install a torch wheel that has them"
    missing = [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    missing += [] if ninja_program() else ["ninja"]
    if missing:
        names = " ".join(missing)
        return f"{names} was missing when prefkern was built; pip install {names}, install again"
    cxx = compiler()
    if cxx is None:
        return "no C++ compiler (c++, g++ or clang++) was found; install g++ 11 or newer"
    return try_compiler(cxx)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and Path(home, "bin/nvcc").exists():
        return str(Path(home, "bin/nvcc"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version() -> str:
    """Such as 13.0."""
    program = nvcc()
    assert program is not None
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        sys.exit(f"{program} --version names no release:\n{text}")
    return found[1]


def cuda_archs() -> list[str]:
    archs = (os.environ.get("PREFKERN_CUDA_ARCHS") or CUDA_ARCHS).replace(" ", "").split(",")
    for arch in archs:
        if not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
            sys.exit(
                f"PREFKERN_CUDA_ARCHS must be a comma-separated list such as {CUDA_ARCHS}, got "
                f"{arch!r}"
            )
    return sorted(set(archs), key=arch_number)


def arch_number(arch: str) -> int:
    return int(arch.strip("sm_af"))


def gencode(archs: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{x.removeprefix('sm_')},code={x}" for x in archs]
    newest = arch_number(archs[-1])  # without a letter: PTX that later GPUs take
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def host_compiler() -> list[str]:
    cxx = compiler()
    assert cxx is not None
    return [f"-ccbin={cxx[0]}", *(f"-Xcompiler={flag}" for flag in cxx[1:])]


def why_not_cuda() -> str | None:
    """The reason for building no CUDA library, or None when it can be built."""
    if REASON is not None:
        return REASON
    if os.environ.get("PREFKERN_NO_CUDA", "0") not in ("", "0"):
        return "PREFKERN_NO_CUDA was set when prefkern was installed; unset it and install again"
    folder = torch_folder()
    assert folder is not None
    has_cuda = any((folder / "lib").glob("libtorch_cuda*"))
    if not has_cuda and not os.environ.get("PREFKERN_CUDA_ARCHS"):
        return (
            f"torch {importlib.metadata.version('torch')} has no CUDA, so nothing could load the "
            "library; install a CUDA build of torch first, or name GPUs in PREFKERN_CUDA_ARCHS to "
            "build it all the same"
        )
    program = nvcc()
    if program is None:
        return (
            "nvcc was not found when prefkern was built; install a CUDA toolkit (12.8 or newer has "
            "every default GPU), put nvcc on PATH or set CUDA_HOME, install again"
        )
    archs = cuda_archs()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
        command = [program, "-std=c++20", *host_compiler(), *gencode(archs), "-c", source]
        command += ["-o", Path(folder, "probe.o")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        text = result.stderr + result.stdout
        first = next((x for x in text.splitlines() if "error" in x or "fatal" in x), text)
        return (
            f"{program} cannot compile an empty kernel for {','.join(archs)} ({first.strip()}); "
            "fix the toolkit, or choose GPUs it knows with PREFKERN_CUDA_ARCHS"
        )
    return None


def extensions() -> list[Extension]:
    host = Extension("prefkern._C", ["csrc/host.cpp"])
    isa_order = {f"kernels_{isa}": place for place, isa in enumerate(ISA_FLAGS)}
    files = [CSRC / "ops.cpp"]
    for file in sorted((CSRC / "cpu").glob("*.cpp"), key=lambda f: (isa_order.get(f.stem, -1), f)):
        if file.stem.startswith("kernels_") and file.stem not in isa_order:
            continue  # an instruction set of another architecture
        files.append(file)
    made = [host, Extension("prefkern._ops_cpu", [str(f.relative_to(ROOT)) for f in files])]
    if CUDA_REASON is None:
        files = [*sorted((CSRC / "cuda").glob("*.cpp")), *sorted((CSRC / "cuda").glob("*.cu"))]
        made.append(Extension("prefkern._ops_cuda", [str(f.relative_to(ROOT)) for f in files]))
    return made


def macro_string(name: str, text: str) -> str:
    return f"-D{name}={json.dumps(text)}"


class NinjaBuild(build_ext):
    """Compiles through ninja: parallel, incremental, with header dependencies."""

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module, so no interpreter in its name; asked for with and without package.
        if fullname.endswith(("_ops_cpu", "_ops_cuda")):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        folder = self.objects_folder()
        folder.mkdir(parents=True, exist_ok=True)
        # Two installs from one checkout may run at once; they share the object files.
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            outputs = self.write_ninja(folder)
            jobs = str(self.parallel or os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            subprocess.run([ninja_program(), "-C", str(folder), "-j", jobs], check=True)
            for name, built in outputs.items():
                target = Path(self.get_ext_fullpath(name))
                target.parent.mkdir(parents=True, exist_ok=True)
                replace_file(built, target)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            name = self.get_ext_filename(self.get_ext_fullname(ext.name))
            replace_file(Path(self.build_lib, name), ROOT / name)

    def objects_folder(self) -> Path:
        key = json.dumps([sys.prefix, sys.version, str(torch_folder()), compiler()])
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        return ROOT / "build" / f"native-{sys.implementation.cache_tag}-{digest}"

    def write_ninja(self, folder: Path) -> dict[str, Path]:
        """Writes build.ninja; returns extension name -> shared library."""
        cxx = compiler()
        torch_path = torch_folder()
        assert cxx is not None and torch_path is not None
        user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        # Sources are named from here, so that a library does not depend on where it was built;
        # error messages that print __FILE__ start with csrc/.
        common = [*CXX_FLAGS, f"-fmacro-prefix-map={os.path.relpath(ROOT, folder)}/="]
        user_link = shlex.split(os.environ.get("LDFLAGS", ""))
        isa_macros = [f"-DPREFKERN_ISA_{isa.upper()}=1" for isa in ISA_FLAGS]
        import pybind11

        per_extension = {
            "prefkern._C": [
                f"-I{sysconfig.get_path('include')}",
                f"-isystem{pybind11.get_include()}",
                macro_string("PREFKERN_CXX", shlex.join(cxx)),
                macro_string("PREFKERN_CXX_FLAGS", shlex.join([*CXX_FLAGS, *user_flags])),
                macro_string("PREFKERN_ISA_VARIANTS", ",".join(ISA_FLAGS)),
                macro_string("PREFKERN_BUILD_TORCH", importlib.metadata.version("torch")),
                macro_string("PREFKERN_TORCH_TARGET", TORCH_TARGET),
                macro_string(
                    "PREFKERN_ISA_FLAGS",
                    "; ".join(f"{isa}: {' '.join(flags)}" for isa, flags in ISA_FLAGS.items()),
                ),
            ],
            "prefkern._ops_cpu": [
                f"-I{os.path.relpath(CSRC, folder)}",
                f"-isystem{torch_path / 'include'}",
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
                *isa_macros,
            ],
        }
        # USE_CUDA declares the CUDA functions of torch's C interface, in a CPU build of torch too.
        per_extension["prefkern._ops_cuda"] = [*per_extension["prefkern._ops_cpu"], "-DUSE_CUDA"]
        link = {
            "prefkern._C": [],
            "prefkern._ops_cpu": ["-Wl,-z,defs", f"-L{torch_path / 'lib'}", "-ltorch_cpu"],
            # The libraries that a CUDA build of torch has loaded. A CPU build has no libtorch_cuda:
            # an empty library of that name stands in for it at link time.
            "prefkern._ops_cuda": [
                *("-Xlinker=--no-as-needed,-z,defs,-z,relro,-z,now", "-Xlinker=--exclude-libs,ALL"),
                *(f"-L{torch_path / 'lib'}", "-Lstandin", "-ltorch_cpu", "-ltorch_cuda"),
            ],
        }
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {ninja_words(cxx)}",
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            f"  command = $cxx {ninja_words(LINK_FLAGS)} $in -o $out $flags",
            "  description = link $out",
        ]
        if CUDA_REASON is None:
            lines += cuda_rules(torch_path)
        outputs: dict[str, Path] = {}
        for ext in self.extensions:
            objects = []
            for source in ext.sources:
                isa = Path(source).stem.removeprefix("kernels_")
                isa_flags = ISA_FLAGS.get(isa, []) if "kernels_" in source else []
                flags = [*common, *per_extension[ext.name], *isa_flags, *user_flags]
                rule = "compile" if source.endswith(".cpp") else "compile_cuda"
                objects.append(str(Path(source).with_suffix(".o")))
                relative = os.path.relpath(ROOT / source, folder)
                lines.append(f"build {ninja_path(objects[-1])}: {rule} {ninja_path(relative)}")
                if rule == "compile":
                    lines.append(f"  flags = {ninja_words(flags)}")
                else:
                    include = f"-I{os.path.relpath(CSRC, folder)}"
                    cuda_flags = [*NVCC_FLAGS, *gencode(cuda_archs()), *host_compiler(), include]
                    lines.append(f"  flags = {ninja_words(cuda_flags)}")
            library = Path(self.get_ext_filename(ext.name)).name
            inputs = " ".join(map(ninja_path, objects))
            cuda = library.startswith("_ops_cuda")
            rule, after = ("link_cuda", " | standin/libtorch_cuda.so") if cuda else ("link", "")
            lines.append(f"build {ninja_path(library)}: {rule} {inputs}{after}")
            # nvcc, which links the CUDA library, does not take a compiler driver's LDFLAGS
            flags = [*link[ext.name], *([] if cuda else user_link)]
            lines.append(f"  flags = {ninja_words(flags)}")
            outputs[ext.name] = folder / library
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        return outputs


def cuda_rules(torch_path: Path) -> list[str]:
    """Rules for .cu files and the CUDA library, and the stand-in of libtorch_cuda.so."""
    program = nvcc()
    assert program is not None
    standin = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    made = torch_path / "lib/libtorch_cuda.so"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    command = (
        f"ln -sf {ninja_words([str(made)])} $out"
        if made.exists()
        else f"echo {ninja_words([standin])} | $cxx {ninja_words(flags)} -x c++ - -o $out"
    )
    return [
        f"nvcc = {ninja_words([program])}",
        f"host = {ninja_words(host_compiler())}",
        "rule compile_cuda",
        "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link_cuda",
        "  command = $nvcc -shared -cudart=static -nodlink $host $in -o $out $flags",
        "  description = link $out",
        "rule standin",
        f"  command = {command}",
        "build standin/libtorch_cuda.so: standin",
    ]


class PyBuild(build_py):
    """Python files, plus prefkern/_build.json: whether the native part was built, or why not."""

    def run(self) -> None:
        if self.editable_mode:
            # libraries of an earlier install would still be loaded
            stale = [*ROOT.glob("prefkern/_ops_cuda.so")] if CUDA_REASON is not None else []
            if REASON is not None:
                stale = [*ROOT.glob("prefkern/_C*.so"), *ROOT.glob("prefkern/_ops_*.so")]
            for library in stale:
                library.unlink()
        else:
            # setuptools keeps build/lib between builds: a deleted module would enter the wheel.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / "prefkern/_build.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "native": REASON is None,
            "reason": REASON,
            "cuda": CUDA_REASON is None,
            "cuda_reason": CUDA_REASON,
            "cuda_archs": cuda_archs() if CUDA_REASON is None else [],
            "cuda_toolkit": nvcc_version() if CUDA_REASON is None else None,
            "python": platform.python_version(),
        }
        target.write_text(json.dumps(record, indent=1) + "\n")


def replace_file(source: Path, target: Path) -> None:
    """Puts `source` at `target` by renaming: a process that has the old library mapped lives on."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, scratch)
    scratch.chmod(0o755)
    os.replace(scratch, target)


def ninja_path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_words(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


REASON = why_not_native()
if REASON is not None:
    print(
        f"prefkern: building the pure Python package without the native part: {REASON}",
        file=sys.stderr,
    )

CUDA_REASON = why_not_cuda()
if REASON is None and CUDA_REASON is not None:
    print(f"prefkern: building without the CUDA library: {CUDA_REASON}", file=sys.stderr)

setup(
    packages=[*find_packages(include=["prefkern", "prefkern.*"]), "prefkern.kernels"],
    package_dir={"prefkern.kernels": "kernels"},
    ext_modules=[] if REASON is not None else extensions(),
    cmdclass={"build_ext": NinjaBuild, "build_py": PyBuild},
)
