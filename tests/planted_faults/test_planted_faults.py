"""The suite's checks run on broken backends; a fault that stays green is a hole in the suite."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from cases import (
    BF16,
    FP32,
    FP64,
    OPTIONS,
    REGIMES,
    Regime,
    one_model,
)
from op_checks import check_closeness, check_masked_rows

STATS = ("logp", "lse", "ent")
# 67 rows and 1,003 columns: both axes end in a ragged tile of the twin (8 x 16), 63 tiles to merge
CASE = Regime("planted", N=67, V=1003, D=24)
# 219 tiles of rows are summed into one dW of 54 numbers
LONG_CASE = Regime("planted_long", N=2500, V=9, D=6)
NAN_CASE = Regime("planted_nan", N=40, V=70, D=9)


@pytest.fixture
def twin(fresh_backend_module):
    path = Path(__file__).with_name("tiled_twin.py")
    spec = importlib.util.spec_from_file_location("prefkern_planted_twin", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fresh_backend_module(module, "planted")
    return module


# fault -> the check that must turn red
RED = {
    "bf16_accumulator": lambda: check_closeness("planted", one_model(CASE, FP32), STATS),
    "missing_rescale": lambda: check_closeness("planted", one_model(CASE, FP32), STATS),
    "unmasked_nan_row": lambda: check_masked_rows(
        "planted", one_model(NAN_CASE, FP32), STATS, float("nan")
    ),
    "lse_off_by_one_tile": lambda: check_closeness("planted", one_model(CASE, FP32), STATS),
    "dw_of_last_ragged_tile": lambda: check_closeness("planted", one_model(CASE, FP32), STATS),
}


def test_every_fault_is_listed_and_checked(twin):
    assert set(RED) == set(twin.FAULTS)
    text = Path(__file__).with_name("README.md").read_text()
    for fault in twin.FAULTS:
        assert f"`{fault}`" in text, f"planted_faults/README.md does not list {fault}"


def test_the_twin_without_a_fault_is_green(twin):
    """Otherwise a red check below would prove nothing."""
    for dtype in (FP32, BF16, FP64):
        check_closeness("planted", one_model(CASE, dtype), STATS)
        check_masked_rows("planted", one_model(NAN_CASE, dtype), STATS, float("nan"))
    for regime in REGIMES:
        if regime.V < 5000:
            check_closeness("planted", one_model(regime, FP32), STATS)
    for option in OPTIONS:
        check_closeness("planted", one_model(CASE, FP32, option=option), STATS, option=option)
    check_closeness("planted", one_model(CASE, FP32), STATS, wanted=("hidden",))


@pytest.mark.parametrize("fault", RED)
def test_fault_turns_a_check_red(twin, fault):
    twin.FAULT = fault
    with pytest.raises(AssertionError) as error:
        RED[fault]()
    # our own message, not an accident on the way
    assert any(
        words in str(error.value) for words in ("worse than", "not finite", "differ", "exactly 0")
    )


@pytest.mark.parametrize("statistic", STATS)
def test_a_wide_accumulator_of_16_bit_inputs_is_told_from_a_narrow_one(twin, statistic):
    """The hardest case: inputs are bf16 anyway, only the sum over tiles is too narrow."""
    inputs = one_model(LONG_CASE, BF16)
    check_closeness("planted", inputs, (statistic,))
    twin.FAULT = "bf16_accumulator"
    with pytest.raises(AssertionError, match="worse than"):
        check_closeness("planted", inputs, (statistic,))
