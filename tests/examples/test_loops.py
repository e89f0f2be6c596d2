"""Loops and routers around the losses: what each example promises is there."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    """example(name): the module, its starting model shared with the others of this file."""
    sys.path.insert(0, str(FOLDER))
    import tiny

    begin, kept = tiny.start, []

    def start():
        if not kept:
            kept.append(begin())
        return copy.deepcopy(kept[0])

    tiny.start = start

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    tiny.start = begin
    sys.path.remove(str(FOLDER))


@pytest.fixture(autouse=True)
def _quiet(capsys, one_thread):
    yield
    capsys.readouterr()


def test_router_sends_to_people_what_the_model_gets_wrong(example):
    router = example("hybrid_router")
    found = router.main()
    for tag in router.TAGS:
        rest = [found[f"gain_{x}"] for x in ("chat", "code")]
        if tag in router.TAGS[router.BIASED]:
            assert found[f"gain_{tag}"] > max(0.03, *rest), tag
        if tag in router.TAGS[router.CARELESS]:
            assert found[f"gain_{tag}"] < min(-0.03, *rest), tag
    assert found["correlation"] > 0.5  # on mixes the regression has not seen
    others = max(found[name] for name in ("all_model", "all_people", "random"))
    assert found["routed"] > others + 0.05 and found["to_people"] <= 1 / 3


def test_router_recovers_the_gains_of_a_linear_score(example):
    import torch

    router = example("hybrid_router")
    draw = torch.Generator().manual_seed(0)
    data = router.pairs(100, seed=0)
    counts = torch.stack([router.counts(data, router.random_mix(data, draw)) for _ in range(20)])
    gains = torch.tensor([0.03, -0.01, 0.0, 0.02, -0.02, 0.01]).double()
    predictor = router.fit_predictor(counts, 0.5 + counts @ gains)
    torch.testing.assert_close(predictor.gains, gains)
    routed = router.route(data, predictor, 40)
    gain = data.tags.double() @ gains
    assert routed.sum() <= 40 and gain[routed].min() > 0
    assert gain[routed].min() >= gain[~routed].max() - 1e-9
    with pytest.raises(ValueError, match="more mixes than tags"):
        router.fit_predictor(counts[:6], counts[:6] @ gains)
