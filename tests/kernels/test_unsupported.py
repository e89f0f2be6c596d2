"""Why the Triton backend declines a call: every reason names what is missing."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from prefkern.kernels import tiles

from prefkern import kernels
from prefkern.backends import choice
from prefkern.backends.contract import Problem
from prefkern.ops import shared


def problem(**changes):
    return Problem(**{"op": "linear_logps", "device": "cuda", "dtype": torch.bfloat16, **changes})


@pytest.fixture
def compiled(monkeypatch):
    """As in a process without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_no_driver(compiled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in " ".join(kernels.unsupported(problem()))


def test_cpu_tensors_need_the_interpreter(compiled, monkeypatch):
    assert "TRITON_INTERPRET=1" in " ".join(kernels.unsupported(problem(device="cpu")))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.unsupported(problem(device="cpu")) == []
    assert "for cpu tensors" in " ".join(kernels.unsupported(problem()))


def test_interpreted_kernels_serve_only_when_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = problem(device="cpu", dtype=torch.float32)
    assert "name the backend" in " ".join(choice.held_back("triton", asked))
    assert choice.select_backend(asked) != "triton"
    assert choice.select_backend(asked, "triton") == "triton"


@pytest.mark.parametrize("name", ["sm_75", "sm_89", "gfx90a"])
def test_an_arch_without_tiles(compiled, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tiles, "device_class", lambda index: (None, name))
    reasons = " ".join(kernels.unsupported(problem()))
    assert name in reasons and "sm_90" in reasons


def test_the_tensors_own_device_is_asked(compiled, monkeypatch):
    """Not the current one, which may be another kind of GPU."""
    classes = {0: ("sm_90", "sm_90"), 1: (None, "sm_75")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tiles, "device_class", classes.__getitem__)
    assert kernels.unsupported(problem(index=0)) == kernels.unsupported(problem()) == []
    assert "this GPU is sm_75" in " ".join(kernels.unsupported(problem(index=1)))


def test_the_problem_of_a_call_knows_its_device(monkeypatch):
    seen = []
    monkeypatch.setattr(choice, "select_backend", lambda p, _: seen.append(p) or "eager")
    shared.choose_backend(
        "linear_logps", torch.device("cuda", 3), torch.float32, None, "", "auto", None
    )
    assert (seen[0].device, seen[0].index) == ("cuda", 3)


def test_dtypes_and_ops():
    reasons = " ".join(kernels.unsupported(problem(dtype=torch.float8_e4m3fn)))
    assert "float8_e4m3fn" in reasons and "bfloat16" in reasons
    assert "no_such_op" in " ".join(kernels.unsupported(problem(op="no_such_op")))
    assert "no error_sum" in " ".join(kernels.unsupported(problem(op="error_sum")))


def test_no_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernels._no_triton.cache_clear()
    try:
        assert "not installed" in " ".join(kernels.unsupported(problem(device="cpu")))
    finally:
        kernels._no_triton.cache_clear()
