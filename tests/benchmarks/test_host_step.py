"""Kernels beside the products, and the host's part of a step, without a GPU."""

from __future__ import annotations

import pytest

from benchmarks import host_step, model


@pytest.mark.parametrize("name", host_step.STEPS)
def test_kernels_beside_the_products_are_as_counted(name):
    counts = model.KernelCounts("cuda")
    found = host_step.kernels_beside_the_products(name)
    # the suite fills what the package allocates empty (conftest.py)
    forward, backward = (sum(n for k, n in x.items() if k != "fill_") for x in found)
    assert forward == counts.launches(f"{name} forward")
    if name != "frozen":  # whose backward is counted with nothing
        assert backward == counts.launches(f"{name} backward")


def test_one_kernel_each_for_sums_statistics_and_coefficients():
    """And of a frozen head one for each tile."""
    forward, backward = host_step.kernels_beside_the_products("tdpo")
    assert (forward["fold"], forward["merge"], forward["finish"]) == (1, 1, 1)
    assert (backward["pull"], backward["gradient"]) == (1, 1)
    forward, _ = host_step.kernels_beside_the_products("frozen")
    assert forward["fold_frozen"] == 1 and not {"fold", "factor", "raise_rows"} & forward.keys()
    few, _ = host_step.kernels_beside_the_products("frozen", rows_of_a_kernel=1000)
    assert (few["fold"], few["factor"], few["fold_frozen"]) == (1, 1, 0)


def test_a_step_without_its_kernels_runs():
    assert 0 < host_step.host_seconds("tdpo", repeats=2) < 10
