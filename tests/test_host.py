"""prefkern._C: build and CPU information."""

from __future__ import annotations

import platform

import pytest

host = pytest.importorskip("prefkern._C", reason="prefkern was installed without the native part")


def test_build_info_names_what_was_built():
    info = host.build_info()
    assert {"compiler", "compiler_version", "flags", "isa_flags", "torch"} <= set(info)
    assert info["isa_variants"][0] == "baseline"
    assert "-fopenmp" not in info["flags"]
    assert info["torch_target"] == "0x020a000000000000"


def test_cpu_capabilities_agree_with_the_kernel():
    cpu = host.cpu_capabilities()
    assert cpu["architecture"] == {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    assert cpu["variants"][0] == "baseline"
    if cpu["architecture"] != "x86_64":
        pytest.skip("the flag names of /proc/cpuinfo below are those of x86-64")
    with open("/proc/cpuinfo") as file:
        flags = set(next(line for line in file if line.startswith("flags")).split(":")[1].split())
    linux = {"sse4.2": "sse4_2", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
    linux["avx512fp16"] = "avx512_fp16"
    for name in ("sse4.2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl",
                 "avx512dq", "avx512vnni", "avx512bf16", "avx512fp16", "amx_bf16"):  # fmt: skip
        assert (name in cpu["isa"]) == (linux.get(name, name) in flags), name
    assert ("avx512bf16" in cpu["variants"]) == ({"avx512f", "avx512_bf16", "avx512vl"} <= flags)
