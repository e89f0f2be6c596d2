"""`prefkern env`: the report, its reasons, and a self-test that can fail."""

import json
import re
import types

import pytest

from prefkern import env
from prefkern.backends import choice
from prefkern.backends import eager as reference
from prefkern.cli import env_report


def test_report_is_json_and_names_every_backend_and_variable(capsys):
    assert env_report.run(as_json=True) == 0
    info = json.loads(capsys.readouterr().out)
    assert [b["name"] for b in info["backends"]] == list(choice.backend_names())
    assert set(env.VARIABLES) <= set(info["environment"])
    assert info["versions"]["torch"] and info["versions"]["numpy"]
    for backend in info["backends"]:
        assert backend["on"] or backend["reasons"], backend


def test_text_shows_state_and_reason(monkeypatch):
    monkeypatch.setenv("PREFKERN_CPU_ISA", "baseline")
    text = env_report.format_text(env_report.collect())
    assert "eager      on for cpu" in text
    assert "PREFKERN_CPU_ISA=baseline" in text
    assert "PREFKERN_BACKEND not set (" in text
    if "cpu        on for cpu" in text:
        assert "kernels in use: " in text


def test_a_missing_build_record_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(env_report, "PACKAGE", tmp_path)
    assert "pip install --no-build-isolation" in env_report.build_record()["reason"]


def test_self_test_passes_on_every_backend_that_is_on(capsys):
    assert env_report.run(check=True) == 0
    assert "all passed" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_self_test_catches_a_wrong_backend(fault, fresh_backend_module, capsys):
    def fold(call, kept):
        found = reference.fold(call, kept)
        wrong = fault == "forward" and call.ref is None
        return found._replace(at=found.at * 1.001) if wrong else found

    def unfold(call, *args):
        found = reference.unfold(call, *args)
        wrong = fault == "backward" and call.ref is None and found.hidden is not None
        return found._replace(hidden=found.hidden * 1.001) if wrong else found

    module = types.ModuleType("prefkern_planted_backend")
    module.__dict__.update({name: getattr(reference, name) for name in reference.__all__})
    module.fold, module.unfold = fold, unfold
    fresh_backend_module(module, "planted")
    assert env_report.run(check=True) == 1
    out = capsys.readouterr().out
    assert re.search(r"FAIL planted +cpu +float32 +linear_logps ", out), out
    assert re.search(r"ok +planted +cpu +float32 +linear_divergence ", out), out
