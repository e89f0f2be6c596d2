"""Both kinds of table for every example: a list of rows and a `datasets.Dataset`."""

from __future__ import annotations

import copy

import pytest


@pytest.fixture(params=["rows", "dataset"])
def check(request):
    """check(function, rows, expected, *args, **options): exact rows, kind kept, input untouched."""

    def run(function, rows, expected, *args, **options):
        before = copy.deepcopy(rows)
        if request.param == "rows":
            found = function(rows, *args, **options)
            assert isinstance(found, list)
            assert rows == before
        else:
            datasets = pytest.importorskip("datasets")
            table = datasets.Dataset.from_list(rows)
            result = function(table, *args, **options)
            assert isinstance(result, datasets.Dataset)
            assert table.to_list() == datasets.Dataset.from_list(before).to_list()
            found = result.to_list()
        assert found == expected

    return run
