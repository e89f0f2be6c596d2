"""The account on paper and the mixed rows."""

from __future__ import annotations

import pytest
import torch

from benchmarks import mixture, model
from benchmarks.cases import GPU_FIRST


def test_predicted_csv_is_what_the_counts_give(tmp_path):
    """After a change of results/counts.csv or of the model:
    python -m benchmarks --cases predicted --out benchmarks/results"""
    made, kept = model.write(tmp_path), model.RESULTS / "predicted.csv"
    assert made.read_text() == kept.read_text()


@pytest.mark.parametrize("machine", model.MACHINES)
@pytest.mark.parametrize("name", ("cuda", "triton"))
def test_a_prediction_follows_its_parts(machine, name):
    speed = model.MACHINES[machine]
    for case in GPU_FIRST:
        kept, none = (model.predict(case, name, speed, b) for b in (1 << 40, 0))
        for part in kept:
            assert kept[part]["ratio"] > 1 and none[part]["ratio"] > 1
        # what is not kept is a product more for each head the backward reads
        again = case.backward_heads * case.flops_per_product / speed.flops
        gap = (none["step"]["ms"] - kept["step"]["ms"]) / 1e3
        assert gap == 0 if case.frozen else gap > again * 0.99
        # products alone: everything else costs nothing on a machine without limits
        free = speed._replace(copy=1e30, lanes=1e30)
        launches = model.predict(case, name, free, 1 << 40)["step"]["ratio"]
        assert 1 < launches < kept["step"]["ratio"]


def test_measured_stands_beside_predicted():
    row = {"what": "step", "case": GPU_FIRST[0].name, "variant": "prefkern cuda", "ratio": 1.3}
    (found,) = model.beside([row], "NVIDIA H100 80GB HBM3")
    assert found["predicted_ratio"] == pytest.approx(1.28, abs=0.01) and found["ratio"] == 1.3
    (other,) = model.beside([row], "NVIDIA L4")
    assert other["predicted_ratio"] is None


@pytest.mark.parametrize("share", mixture.SHARES)
def test_the_share_of_units_is_as_stated(share):
    """Counted from exact masses, at a small vocabulary in small chunks (129 of them)."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4100, 512, generator=g) * 2 * 512**-0.5
    hidden, targets = mixture.rows(weight, 3000, share, g, chunk=32)
    found = mixture.share_needed(hidden, weight, targets, chunk=32)
    # a flat row of 32-column chunks leaves out its lightest ones: 0.9 of its units are needed
    assert found == pytest.approx(share, rel=0.15)


def test_units_needed_against_plain_loops():
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(9, 16, generator=g), 2 * torch.randn(70, 16, generator=g)
    targets = torch.randint(0, 70, (9,), generator=g)
    needed = 0
    for h, y in zip(hidden, targets, strict=True):
        p = (weight @ h).double().softmax(0)
        masses = [(float(part.sum()), i) for i, part in enumerate(p.split(8))]
        left = mixture.MASS
        for mass, i in sorted(masses):
            left -= mass
            needed += left < 0 or i == int(y) // 8
    assert mixture.share_needed(hidden, weight, targets, chunk=8) == needed / (9 * 9)
