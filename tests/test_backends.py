"""Which backend serves a call: authority, refusals with every reason, registration."""

from __future__ import annotations

import logging
import subprocess
import sys
import types

import pytest
import torch
from cases import FP32, SMALL, make_inputs
from closeness import assert_same_bits

import prefkern
from prefkern.backends import choice
from prefkern.backends.contract import Problem

PROBLEM = Problem(
    op="linear_logps", device="cpu", dtype=torch.float32, stats=("logp",), N=4, V=5, D=3
)


def recorder(name: str, served: list[str], reasons=()):
    """A backend that notes who was called and lets the eager one do the work."""
    module = types.ModuleType(f"prefkern_test_{name}")
    reference = choice.load_backend("eager")
    module.__dict__.update({name: getattr(reference, name) for name in reference.__all__})

    def fold(*args):
        served.append(name)
        return reference.fold(*args)

    module.unsupported = lambda problem: list(reasons)
    module.fold = fold
    return module


@pytest.fixture
def two(fresh_backend_module):
    served: list[str] = []
    fresh_backend_module(recorder("one", served), "one")
    fresh_backend_module(recorder("other", served), "other")
    return served


def call(**arguments):
    inputs = make_inputs(SMALL, FP32)
    return prefkern.linear_logps(inputs.hidden, inputs.weight, inputs.targets, **arguments).logp


def test_the_argument_beats_the_context_beats_the_environment(two, monkeypatch):
    monkeypatch.setenv("PREFKERN_BACKEND", "one")
    call()
    with prefkern.use_backend("other"):
        call()
        call(backend="one")
    call()
    assert two == ["one", "other", "one", "one"]


def test_use_backend_nests_and_restores_after_an_error(two):
    with prefkern.use_backend("one"):
        with pytest.raises(RuntimeError, match="inside"), prefkern.use_backend("other"):
            call()
            raise RuntimeError("inside")
        call()
        with prefkern.use_backend("auto"):
            assert choice.select_backend(PROBLEM) not in ("one", "other")
    assert two == ["other", "one"]


def test_use_backend_does_not_leak_into_other_threads(two):
    import threading

    seen = []
    with prefkern.use_backend("one"):
        thread = threading.Thread(target=lambda: seen.append(choice.select_backend(PROBLEM)))
        thread.start()
        thread.join()
    assert seen and seen[0] != "one"


@pytest.mark.parametrize("name", ["cudnn", "", "REFERENCE", None])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="backend must be one of"), prefkern.use_backend(name):
        pass


def test_an_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("PREFKERN_BACKEND", "fastest")
    with pytest.raises(ValueError) as error:
        call()
    assert "fastest" in str(error.value) and "PREFKERN_BACKEND" in str(error.value)


def test_an_empty_environment_variable_means_automatic(monkeypatch):
    monkeypatch.setenv("PREFKERN_BACKEND", "")
    assert choice.select_backend(PROBLEM) in choice.backend_names()


@pytest.mark.parametrize("way", ["argument", "context", "environment"])
def test_an_explicit_choice_that_cannot_serve_gives_every_reason(
    way, fresh_backend_module, monkeypatch
):
    """Never a silent fallback: the message names the call, and what each backend says about it."""
    fresh_backend_module(recorder("broken", [], ["needs a full moon", "needs fp12"]), "broken")
    fresh_backend_module(recorder("also_broken", [], ["is asleep"]), "also_broken")

    def run():
        if way == "argument":
            return call(backend="broken")
        if way == "context":
            with prefkern.use_backend("broken"):
                return call()
        monkeypatch.setenv("PREFKERN_BACKEND", "broken")
        return call()

    with pytest.raises(ValueError) as error:
        run()
    text = str(error.value)
    for word in (
        "'broken'",
        "needs a full moon",
        "needs fp12",
        "is asleep",
        "linear_logps",
        "float32",
        "N=23",
        "V=61",
    ):
        assert word in text, f"{word!r} is missing: {text}"
    for name in choice.backend_names():
        assert name in text


def test_automatic_choice_passes_over_and_says_so_once(fresh_backend_module, caplog, monkeypatch):
    served: list[str] = []
    fresh_backend_module(recorder("broken", [], ["is asleep"]), "broken")
    fresh_backend_module(recorder("works", served), "works")
    monkeypatch.setattr(choice, "PRIORITY", ("broken", "works", *choice.PRIORITY[:-2]))
    monkeypatch.setattr(choice, "_announced", set())
    with caplog.at_level(logging.INFO, logger="prefkern"):
        call()
        call()
    assert served == ["works", "works"]
    lines = [r.getMessage() for r in caplog.records if "broken" in r.getMessage()]
    assert len(lines) == 1 and "is asleep" in lines[0], lines


def test_automatic_choice_leaves_out_what_is_held_back(fresh_backend_module, monkeypatch):
    """A backend that can serve but asks to be named is used only when named, and a refusal of
    something else still says why it was left out."""
    served: list[str] = []
    module = recorder("timid", served)
    module.held_back = lambda problem: ["no recorded run has seen its kernels"]
    fresh_backend_module(module, "timid")
    fresh_backend_module(recorder("works", served), "works")
    fresh_backend_module(recorder("broken", [], ["is asleep"]), "broken")
    monkeypatch.setattr(choice, "PRIORITY", ("timid", "works", "broken"))
    call()
    call(backend="timid")
    assert served == ["works", "timid"]
    with pytest.raises(ValueError, match="timid: can serve it; no recorded run has seen"):
        call(backend="broken")


def test_no_backend_at_all(fresh_backend_module, monkeypatch):
    fresh_backend_module(recorder("broken", [], ["is asleep"]), "broken")
    monkeypatch.setattr(choice, "PRIORITY", ("broken",))
    with pytest.raises(ValueError, match="is asleep"):
        call()


def test_automatic_choice_is_one_of_the_explicit_ones(backend):
    """The automatic result has the bits of the backend that was chosen, and all agree closely."""
    inputs = make_inputs(SMALL, FP32)
    problem = Problem(
        op="linear_logps",
        device="cpu",
        dtype=FP32,
        weight_dtype=FP32,
        stats=("logp",),
        N=23,
        V=61,
        D=14,
    )
    chosen = choice.select_backend(problem)
    automatic = prefkern.linear_logps(inputs.hidden, inputs.weight, inputs.targets).logp
    explicit = prefkern.linear_logps(
        inputs.hidden, inputs.weight, inputs.targets, backend=chosen
    ).logp
    assert_same_bits(automatic, explicit)
    other = prefkern.linear_logps(
        inputs.hidden, inputs.weight, inputs.targets, backend=backend
    ).logp
    torch.testing.assert_close(other, automatic, rtol=0, atol=2e-5)


def test_the_reference_serves_everything():
    """Whatever the others lack, automatic choice ends somewhere."""
    reference = choice.load_backend("eager")
    for op in ("linear_logps", "linear_divergence", "logits_logps", "segment_sum", "list_rank"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for device in ("cpu", "cuda"):
                assert reference.unsupported(Problem(op=op, device=device, dtype=dtype)) == []


def test_backends_have_the_functions_that_the_ops_call():
    """A head op is a fold and an unfold, or both in one step; other ops are a function each way."""
    head = ("fold", "fold_again", "unfold", "unsupported")
    parts = {
        "linear_logps": head,
        "linear_divergence": head,
        "segment_sum": ("segment_sum_fwd", "segment_sum_bwd"),
        "list_rank": ("list_rank_fwd",),
    }
    for name in choice.backend_names():
        module = choice.load_backend(name)
        for op, functions in parts.items():
            if module.unsupported(Problem(op=op, device="cpu", dtype=torch.float32)):
                continue
            lacking = [f for f in functions if not callable(getattr(module, f, None))]
            assert not lacking, f"{name} claims {op} without {lacking}"


def run_python(code: str, **environment) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            raise ImportError(name + " is hidden by the test")
sys.meta_path.insert(0, Hide())
"""


def test_import_needs_neither_triton_nor_the_extension():
    """`import prefkern` and a fp32 step on the reference backend with both hidden."""
    code = HIDE.format(names="('triton', 'prefkern._C', 'prefkern._ops_cpu')") + (
        "import prefkern, torch\n"
        "h = torch.randn(3, 4, requires_grad=True)\n"
        "a = (h, torch.randn(5, 4), torch.tensor([0, 1, 2]))\n"
        "out = prefkern.linear_logps(*a, backend='eager')\n"
        "out.logp.sum().backward()\n"
        "print('prefkern.kernels' in sys.modules, h.grad.shape)\n"
    )
    assert run_python(code).strip() == "False torch.Size([3, 4])"


def test_no_extension_is_a_reason_not_a_crash():
    """PREFKERN_NO_EXT=1 switches the native backend off, and asking for it says so."""
    code = (
        "import prefkern, torch\n"
        "a = (torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))\n"
        "print(prefkern.linear_logps(*a).logp.shape)\n"
        "try:\n"
        "    prefkern.linear_logps(*a, backend='cpu')\n"
        "except ValueError as error:\n"
        "    print('REFUSED', error)\n"
    )
    out = run_python(code, PREFKERN_NO_EXT="1")
    assert "torch.Size([3])" in out and "REFUSED" in out and "PREFKERN_NO_EXT" in out, out


def test_the_environment_variable_of_a_fresh_process():
    code = (
        "import prefkern, torch\n"
        "from prefkern.backends import choice\n"
        "from prefkern.backends.contract import Problem\n"
        "problem = Problem(op='linear_logps', device='cpu', dtype=torch.float32)\n"
        "print(choice.select_backend(problem))\n"
    )
    assert run_python(code, PREFKERN_BACKEND="eager").strip() == "eager"
