"""The `cuda` backend where there is no GPU: reasons, the ran-on list, the measured order."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import PLAIN_PROBLEM
from prefkern.kernels.epilogue import KERNELS

from prefkern.backends import choice, cuda, eager
from prefkern.backends.contract import Problem

CSRC = Path(__file__).resolve().parents[2] / "csrc/cuda"
ON_GPU = replace(PLAIN_PROBLEM, device="cuda")


def test_kernels_of_the_sources_are_those_of_the_list():
    """Every name that a launch is given is listed, as run or as never run, and nothing else is."""
    if not CSRC.is_dir():
        pytest.skip("the sources are not beside the tests")
    launched: set[str] = set()
    for source in CSRC.glob("*.cu"):
        calls = re.findall(r"(?:launch|start|per_row)<.*?>\((.*?)[,;]", source.read_text(), re.S)
        launched.update(name for call in calls for name in re.findall(r'"(\w+)"', call))
    listed = set(json.loads(cuda.RAN_ON.read_text()))
    assert launched == listed
    assert listed == {name for names in cuda.KERNELS.values() for name in names}


def test_an_entry_says_on_what_it_ran():
    for kernel, run in cuda.ran_on().items():
        assert run is None or set(run) == {"gpu", "commit"}, kernel


def test_automatic_choice_waits_for_a_recorded_run(monkeypatch):
    """Held back until every kernel that the op may launch has a recorded run."""
    monkeypatch.setattr(cuda, "unsupported", lambda problem: [])
    monkeypatch.setattr("prefkern.kernels.unsupported", lambda problem: ["not here"])
    assert any("no recorded run on a GPU" in reason for reason in cuda.held_back(ON_GPU))
    assert choice.select_backend(ON_GPU) != "cuda"
    assert choice.select_backend(ON_GPU, "cuda") == "cuda"
    run = {"gpu": "test", "commit": "0" * 7}
    kernels = cuda.KERNELS["linear_logps"]
    monkeypatch.setattr(cuda, "ran_on", lambda: {k: run for k in kernels})
    monkeypatch.setattr("prefkern.backends.cpu.unsupported", lambda problem: ["cpu only"])
    assert cuda.held_back(ON_GPU) == []
    assert choice.select_backend(ON_GPU) == "cuda"


def test_list_rank_takes_cuda_before_triton_once_its_kernels_have_run(monkeypatch):
    on_gpu = Problem("list_rank", "cuda", torch.float32)
    for name in ("cuda", "kernels"):
        module = "prefkern.backends.cuda" if name == "cuda" else "prefkern.kernels"
        monkeypatch.setattr(f"{module}.unsupported", lambda problem: [])
    assert choice.select_backend(on_gpu) == "triton"
    run = {"gpu": "test", "commit": "0" * 7}
    monkeypatch.setattr(cuda, "ran_on", lambda: {k: run for k in cuda.KERNELS["list_rank"]})
    assert choice.select_backend(on_gpu) == "cuda"
    assert choice.select_backend(Problem("segment_sum", "cuda", torch.float32)) == "triton"
    assert sorted(choice.order("list_rank")) == sorted(choice.PRIORITY)


@pytest.mark.parametrize("variable", ["PREFKERN_NO_CUDA", "PREFKERN_NO_EXT"])
def test_switched_off_by_a_variable(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert cuda.unsupported(ON_GPU) == [f"{variable} is set"]


def test_reasons_name_what_is_wrong_with_the_problem(monkeypatch):
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "load_error", lambda index: None)
    assert cuda.unsupported(ON_GPU) == []
    assert cuda.unsupported(PLAIN_PROBLEM) == ["it runs on cuda tensors, got cpu"]
    wide = replace(ON_GPU, dtype=torch.float64)
    assert cuda.unsupported(wide) == [
        "its linear_logps computes in float32, bfloat16, float16, got torch.float64"
    ]
    assert "it has no conv" in cuda.unsupported(replace(ON_GPU, op="conv"))[0]


def test_a_library_that_was_not_built_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_ops_cuda.so")
    reason = cuda.unsupported(ON_GPU)[0]
    assert "_ops_cuda.so is not there" in reason


def test_gpus_that_the_library_has_code_for():
    archs = ["sm_80", "sm_90a", "sm_100"]
    for served in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        assert cuda.unserved(served, archs) is None
    assert cuda.unserved((9, 0), ["sm_90a"]) is None
    assert "sm_75" in str(cuda.unserved((7, 5), archs))
    assert "sm_80" in str(cuda.unserved((8, 0), ["sm_86", "sm_90a"]))


def test_the_tensors_own_device_is_asked(monkeypatch):
    """Not the current one, which may be of another generation; and the four kernels on numbers per
    row are used by the Triton backend where this one could be."""
    capabilities = {None: (9, 0), 0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(cuda, "_record", lambda: {"cuda_archs": ["sm_80", "sm_90a"]})
    cuda.load_error.cache_clear()
    try:
        assert cuda.unsupported(ON_GPU) == cuda.unsupported(replace(ON_GPU, index=0)) == []
        assert "this GPU is sm_75" in cuda.unsupported(replace(ON_GPU, index=1))[0]
        assert cuda.usable_on(torch.device("cuda", 0))
        assert not cuda.usable_on(torch.device("cuda", 1))
        assert not cuda.usable_on(torch.device("cpu"))
        call = SimpleNamespace(targets=SimpleNamespace(device=torch.device("cuda", 0)))
        assert KERNELS.arithmetic.of(call) is cuda.arithmetic
        call.targets.device = torch.device("cuda", 1)
        assert KERNELS.arithmetic.of(call) is eager.arithmetic
        monkeypatch.setenv("PREFKERN_NO_CUDA", "1")
        assert not cuda.usable_on(torch.device("cuda", 0))
    finally:
        cuda.load_error.cache_clear()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_does_not_load_the_library():
    if cuda.missing():
        pytest.skip(str(cuda.missing()))
    cuda.load_error.cache_clear()
    assert "is built without CUDA" in str(cuda.load_error())


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "refused"),
    [
        ("13.0", "13.0", False),
        ("13.2", "12.8", False),
        ("12.8", "13.0", True),
        ("12.8", None, False),
    ],
)
def test_a_library_newer_than_torchs_cuda_is_refused(torch_cuda, toolkit, refused):
    reason = cuda.older(torch_cuda, toolkit)
    assert (reason is not None) == refused
    if reason:
        assert torch_cuda in reason and toolkit in reason and "build it with" in reason
