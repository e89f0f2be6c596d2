"""What `prefkern env` prints: versions, this machine, every backend with the reason why it is off,
how the native part was built, and a numerical self-test."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import __version__, env
from ..backends import choice, cpu
from ..backends.contract import Problem
from ..head import Head
from ..ops.linear_stats import linear_divergence, linear_logps

PACKAGE = Path(__file__).parents[1]
NOT_INSTALLED = (
    "prefkern runs from a source tree that was not installed; run "
    "pip install --no-build-isolation -e . in its root"
)

# Distributions whose versions matter in a bug report.
DISTRIBUTIONS = (
    *("torch", "triton", "numpy", "transformers", "tokenizers", "datasets", "accelerate", "peft"),
    *("safetensors", "tyro", "matplotlib", "trl", "liger-kernel", "flash-attn", "deepspeed"),
    *("bitsandbytes", "setuptools", "pybind11", "ninja"),
)
OTHER_VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES"),
    *("TRITON_INTERPRET", "CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS"),
)

# A representative call of each op, for asking a backend whether it is on.
PROBE_STATS = {
    "linear_logps": ("logp",),
    "linear_divergence": ("logp", "ref_logp", "fkl"),
    "logits_logps": ("logp",),
}


def collect() -> dict[str, Any]:
    """Everything `prefkern env` reports, as plain JSON types."""
    return {
        "prefkern": {"version": __version__, "path": str(PACKAGE)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "versions": {name: version_of(name) for name in DISTRIBUTIONS},
        "cpu": describe_cpu(),
        "torch": describe_torch(),
        "native": describe_native(),
        "backends": [describe_backend(name) for name in choice.backend_names()],
        "choices": describe_choices(),
        "environment": describe_environment(),
    }


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def host_module() -> tuple[ModuleType | None, str | None]:
    """(prefkern._C, None), or (None, why it is not there)."""
    if env.flag("PREFKERN_NO_EXT"):
        return None, "PREFKERN_NO_EXT is set; unset it"
    try:
        from .. import _C
    except ImportError as error:
        return None, build_record()["reason"] or f"prefkern._C cannot be imported: {error}"
    return _C, None


def build_record() -> dict[str, Any]:
    """What setup.py noted at install time: was the native part built, and if not, why."""
    record = PACKAGE / "_build.json"
    if not record.exists():
        return {"native": False, "reason": NOT_INSTALLED}
    return json.loads(record.read_text())


def describe_cpu() -> dict[str, Any]:
    host, _ = host_module()
    cpu: dict[str, Any] = {"architecture": platform.machine(), "count": os.cpu_count()}
    if hasattr(os, "sched_getaffinity"):
        cpu["usable"] = len(os.sched_getaffinity(0))
    if host is not None:
        cpu.update(host.cpu_capabilities())
    cpu["torch_capability"] = torch.backends.cpu.get_cpu_capability()
    return cpu


def describe_torch() -> dict[str, Any]:
    info: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "onednn": torch.backends.mkldnn.is_available(),
        "mkl": torch.backends.mkl.is_available(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpus": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            capability = f"{gpu.major}.{gpu.minor}"
            memory = round(gpu.total_memory / 2**30, 1)
            info["gpus"].append({"name": gpu.name, "capability": capability, "memory_gib": memory})
    return info


def describe_native() -> dict[str, Any]:
    """The compiled part: what was built, from what, and what is missing."""
    host, reason = host_module()
    library = PACKAGE / "_ops_cpu.so"
    info: dict[str, Any] = {
        "host_module": None if host is None else host.__file__,
        "op_library": str(library) if library.exists() else None,
        "reason": reason,
        "cuda_library": str(cuda) if (cuda := PACKAGE / "_ops_cuda.so").exists() else None,
        "cuda_reason": build_record().get("cuda_reason"),
    }
    if host is not None:
        info["build"] = host.build_info()
        runnable = host.cpu_capabilities()["variants"]
        info["variants"] = [x for x in info["build"]["isa_variants"] if x in runnable]
    if describe_backend("cpu")["on"]:
        info["kernels"] = cpu.isa()
    return info


def describe_backend(name: str) -> dict[str, Any]:
    """Devices a backend serves, and its own reasons where it serves none."""
    devices, reasons = [], []
    for device in usable_devices():
        why_not = sorted(
            {
                reason
                for op, stats in PROBE_STATS.items()
                for reason in choice.unsupported(
                    name, Problem(op, device, torch.float32, torch.float32, stats)
                )
            }
        )
        if why_not:
            reasons += [f"{device}: {reason}" for reason in why_not]
        else:
            devices.append(device)
    return {"name": name, "on": bool(devices), "devices": devices, "reasons": reasons}


def describe_choices() -> list[dict[str, str]]:
    """Which backend each op uses on each device of this machine, and why."""
    rows = []
    for device in usable_devices():
        for op, stats in PROBE_STATS.items():
            problem = Problem(op, device, torch.float32, torch.float32, stats)
            name, why = choice.explain(problem)
            rows.append({"op": op, "device": device, "backend": name, "why": why})
    return rows


def usable_devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def describe_environment() -> dict[str, dict[str, str | None]]:
    ours = {name: {"value": env.get(name), "meaning": text} for name, text in env.VARIABLES.items()}
    other = {name: {"value": os.environ.get(name), "meaning": None} for name in OTHER_VARIABLES}
    return {**ours, **other}


# ---- self-test ----------------------------------------------------------------------------------

N, V, D = 24, 515, 64  # ragged in V on purpose: the last vocabulary tile is not a full one
# Largest error against float64, relative to the largest value. bf16 and fp16 inputs are rounded
# before the comparison, so this is what the computation itself may lose: logits rounded once to
# 8 (bf16) or 11 (fp16) bits.
ALLOWED = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
ONE_MODEL = ("logp", "lse", "ent")
TWO_MODELS = ("logp", "ref_logp", "fkl", "rkl")


def self_test() -> list[dict[str, Any]]:
    """Forward and backward of the fused ops against float64, for every backend that is on.

    Returns one row per backend, device, dtype and op: errors, the error allowed, and `ok`.
    """
    rows = []
    for described in (describe_backend(name) for name in choice.backend_names()):
        for device in described["devices"]:
            for dtype, allowed in ALLOWED.items():
                for op in ("linear_logps", "linear_divergence"):
                    stats = ONE_MODEL if op == "linear_logps" else TWO_MODELS
                    problem = Problem(op, device, dtype, dtype, stats, N, V, D)
                    if choice.unsupported(described["name"], problem):
                        continue
                    start = time.perf_counter()
                    errors = check_op(op, described["name"], device, dtype)
                    rows.append(
                        {
                            "backend": described["name"],
                            "device": device,
                            "dtype": str(dtype).removeprefix("torch."),
                            "op": op,
                            **errors,
                            "allowed": allowed,
                            "ok": all(error <= allowed for error in errors.values()),
                            "seconds": round(time.perf_counter() - start, 3),
                        }
                    )
    return rows


def check_op(op: str, backend: str, device: str, dtype: torch.dtype) -> dict[str, float]:
    """{"forward": error, "d_hidden": error, "d_weight": error} of one op on one backend."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    hidden, ref_hidden = draw(N, D), draw(N, D)
    weight, ref_weight = draw(V, D, scale=D**-0.5), draw(V, D, scale=D**-0.5)
    targets = torch.randint(V, (N,), generator=generator).to(device)
    targets[::5] = -100
    hidden[::5] = float("nan")  # ignored rows must not reach the result
    stats = ONE_MODEL if op == "linear_logps" else TWO_MODELS
    upstream = torch.randn(len(stats), N, generator=generator).to(device)

    def gradients(run: Any, kind: torch.dtype) -> list[Tensor]:
        h, w = (t.detach().to(kind).requires_grad_() for t in (hidden, weight))
        out = run(h, w)
        d_hidden, d_weight = torch.autograd.grad((out * upstream.to(out.dtype)).sum(), (h, w))
        return [out.detach(), d_hidden, d_weight]

    def fused(h: Tensor, w: Tensor) -> Tensor:
        if op == "linear_logps":
            got = linear_logps(h, Head(w, softcap=20.0), targets, stats=stats, backend=backend)
        else:
            heads = Head(w, softcap=20.0), Head(ref_weight, softcap=20.0)
            got = linear_divergence(
                h, heads[0], targets, ref_hidden, heads[1], stats=stats, backend=backend
            )
        return torch.stack([getattr(got, name) for name in stats])

    def exact(h: Tensor, w: Tensor) -> Tensor:
        return exact_statistics(h, w, targets, ref_hidden.double(), ref_weight.double(), stats)

    got, want = gradients(fused, dtype), gradients(exact, torch.float64)
    return {
        "forward": relative_error(got[0], want[0], dim=1),  # each statistic against its own size
        "d_hidden": relative_error(got[1], want[1]),
        "d_weight": relative_error(got[2], want[2]),
    }


def exact_statistics(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    ref_hidden: Tensor,  # [N, D]
    ref_weight: Tensor,  # [V, D]
    stats: tuple[str, ...],
) -> Tensor:  # [len(stats), N]
    """Float64 statistics from full logits, written apart from every backend."""
    scored = (targets != -100).nonzero().squeeze(1)
    z, ref_z = (
        20.0 * torch.tanh(h[scored] @ w.T / 20.0)
        for h, w in ((hidden, weight), (ref_hidden, ref_weight))
    )
    log_p, log_r = z.log_softmax(-1), ref_z.log_softmax(-1)
    label = targets[scored].unsqueeze(1)
    values = {
        "logp": log_p.gather(1, label).squeeze(1),
        "ref_logp": log_r.gather(1, label).squeeze(1),
        "lse": z.logsumexp(-1),
        "ent": -(log_p.exp() * log_p).sum(-1),
        "fkl": (log_r.exp() * (log_r - log_p)).sum(-1),
        "rkl": (log_p.exp() * (log_p - log_r)).sum(-1),
    }
    empty = hidden.new_zeros(len(targets))
    return torch.stack([empty.index_copy(0, scored, values[name]) for name in stats])


def relative_error(got: Tensor, want: Tensor, dim: int | tuple[int, int] = (0, 1)) -> float:
    """Largest difference over the largest magnitude (along `dim`, then the worst of the others);
    infinite when `got` is not finite."""
    if not bool(got.isfinite().all()):
        return float("inf")
    return float(((got.double() - want).abs().amax(dim) / want.abs().amax(dim)).max())


# ---- output -------------------------------------------------------------------------------------


def format_text(info: dict[str, Any], checks: list[dict[str, Any]] | None = None) -> str:
    """The report as a block of text to paste into a bug report."""
    cpu, torch_info, built = info["cpu"], info["torch"], info["native"]
    versions = {k: v for k, v in info["versions"].items() if v is not None}
    absent = [k for k, v in info["versions"].items() if v is None]
    lines = [
        f"prefkern {info['prefkern']['version']} ({info['prefkern']['path']})",
        f"python {info['python']['version']} ({info['python']['executable']})",
        f"platform {info['platform']}",
        "versions " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        f"not installed {', '.join(absent) or 'none'}",
        f"cpu {cpu.get('model') or cpu['architecture']}, {cpu.get('usable', cpu['count'])} usable "
        f"of {cpu['count']}, torch sees {cpu['torch_capability']}",
        f"  instruction sets {' '.join(cpu.get('isa', ['unknown without prefkern._C']))}",
        f"torch threads {torch_info['threads']}, oneDNN {torch_info['onednn']}, MKL "
        f"{torch_info['mkl']}, CUDA {torch_info['cuda']}, HIP {torch_info['hip']}",
    ]
    for gpu in torch_info["gpus"]:
        lines.append(f"  gpu {gpu['name']}, {gpu['capability']}, {gpu['memory_gib']} GiB")
    lines.append("backends")
    for backend in info["backends"]:
        state = "on for " + ", ".join(backend["devices"]) if backend["on"] else "off"
        lines.append(f"  {backend['name']:<10} {state}")
        lines += [f"      not on {reason}" for reason in backend["reasons"]]
    lines.append("automatic choice, float32")
    for row in info["choices"]:
        lines.append(f"  {row['op']:<18} {row['device']:<5} {row['backend']:<10} {row['why']}")
    lines.append("native part")
    lines.append(f"  host module {built['host_module'] or 'missing'}")
    lines.append(f"  op library {built['op_library'] or 'missing'}")
    if built["reason"]:
        lines.append(f"  why: {built['reason']}")
    lines.append(f"  CUDA library {built['cuda_library'] or 'missing'}")
    if built["cuda_reason"]:
        lines.append(f"  why: {built['cuda_reason']}")
    if "build" in built:
        build = built["build"]
        lines.append(f"  built by {build['compiler']} {build['compiler_version']} {build['flags']}")
        lines.append(f"  kernel flags {build['isa_flags']}")
        lines.append(f"  against torch {build['torch']}, stable ABI {build['torch_target']}")
        lines.append(f"  kernels this CPU can run: {', '.join(built['variants'])}")
    if "kernels" in built:
        lines.append(f"  kernels in use: {built['kernels']}")
    lines.append("environment")
    for name, variable in info["environment"].items():
        if variable["value"] is not None:
            lines.append(f"  {name}={variable['value']}")
        elif variable["meaning"] is not None:
            lines.append(f"  {name} not set ({variable['meaning']})")
    if checks is not None:
        lines += format_checks(checks)
    return "\n".join(lines)


def format_checks(checks: list[dict[str, Any]]) -> list[str]:
    lines = ["self-test (largest error against float64, relative to the largest value)"]
    for row in checks:
        errors = ", ".join(f"{k} {row[k]:.1e}" for k in ("forward", "d_hidden", "d_weight"))
        lines.append(
            f"  {'ok  ' if row['ok'] else 'FAIL'} {row['backend']:<10} {row['device']:<5}"
            f"{row['dtype']:<9} {row['op']:<18} {errors} (allowed {row['allowed']:.0e})"
        )
    failed = sum(not row["ok"] for row in checks)
    seconds = sum(row["seconds"] for row in checks)
    verdict = "all passed" if failed == 0 else f"{failed} FAILED"
    lines.append(f"  {len(checks)} checks in {seconds:.1f} s, {verdict}")
    return lines


def run(*, as_json: bool = False, check: bool = False) -> int:
    """Prints the report; exit status 1 when a self-test failed."""
    info = collect()
    checks = self_test() if check else None
    if as_json:
        print(json.dumps({**info, **({} if checks is None else {"self_test": checks})}, indent=1))
    else:
        print(format_text(info, checks))
    return int(checks is not None and not all(row["ok"] for row in checks))
