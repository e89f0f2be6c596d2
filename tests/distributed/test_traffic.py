"""Four ranks hand to collectives what benchmarks/sharded_call.py and cluster.py say."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_checks

WORKER = str(Path(__file__).with_name("traffic_worker.py"))
CHECKS = [("head_calls", "cpu"), ("head_calls", "eager"), ("sharded_units",)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_checks(tmp_path_factory.mktemp("ranks"), WORKER, 4, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: "-".join(c))
def test_traffic_is_the_account_on_paper(found, check):
    if found[check]:
        pytest.fail(found[check], pytrace=False)
