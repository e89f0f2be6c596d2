"""Positions of the numbers that kernels exchange with the driver, by the names of
prefkern/backends/tables.py: `COEF.lse` in a kernel is the row of `lse` among the coefficients."""

from __future__ import annotations

from types import ModuleType

import triton.language as tl

from prefkern.backends.tables import COEFFICIENTS, FACTORS, FIELDS, MAXIMA, NORMS, SECOND
from prefkern.backends.tables import SHIFT as SHIFTS
from prefkern.backends.tiled.epilogue import FLAGS, PARAMS


def _named(name: str, values: dict[str, int]) -> ModuleType:
    """Compiled kernels read constants from their own module or as attributes of another."""
    found = ModuleType(name)
    found.__dict__.update({key: tl.constexpr(value) for key, value in values.items()})
    return found


def _positions(name: str, names: tuple[str, ...]) -> ModuleType:
    return _named(name, {key: i for i, key in enumerate(names)})


FIELD = _positions("FIELD", FIELDS)
SUM = _positions("SUM", SECOND)  # of the second sweep
NORM = _positions("NORM", NORMS)
COEF = _positions("COEF", COEFFICIENTS)
PARAM = _positions("PARAM", PARAMS)
FACTOR = _positions("FACTOR", FACTORS)
MAXIMUM = _positions("MAXIMUM", MAXIMA)
SHIFT = _positions("SHIFT", SHIFTS)
FLAG = _named("FLAG", {key: 1 << i for i, key in enumerate(FLAGS)})
