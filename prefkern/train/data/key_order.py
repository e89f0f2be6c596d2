"""One order for the keys of stored objects, whatever file they come from.

Arrow stores objects as structs, whose fields have one order for the whole column: that in which the
keys first occur. A row read back from Parquet or a `datasets` table so has the keys of its tool
calls in another order than it had as a line of JSON, and a chat template writes what it is given.
Rows of every source are brought into Arrow's order here. Objects that are stored as JSON text keep
their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN = frozenset({str, int, float, bool, type(None)})  # what holds no objects


class KeyOrder:
    """The keys that were seen in one place of the rows, in the order they first came in."""

    __slots__ = ("_fields", "_items", "_rank", "_sorted")

    def __init__(self) -> None:
        self._rank: dict[Any, int] = {}
        self._sorted: set[tuple[Any, ...]] = set()  # sequences of keys that are in order
        self._fields: dict[Any, KeyOrder] = {}
        self._items: KeyOrder | None = None  # of a list: all of its entries are one place

    def __call__(self, value: Any) -> Any:
        """`value` with the keys of its objects in order, at every depth; keys of this value that
        are new follow those that are known. What is in order is not copied."""
        if isinstance(value, dict):
            return self._object(value)
        if isinstance(value, list | tuple):
            if self._items is None:
                self._items = KeyOrder()
            items = self._items
            found = [item if type(item) in PLAIN else items(item) for item in value]
            for before, after in zip(value, found, strict=True):
                if before is not after:
                    return found
            return value
        return self._object(dict(value)) if isinstance(value, Mapping) else value

    def _object(self, value: dict[Any, Any]) -> dict[Any, Any]:
        changed = {
            key: after
            for key, before in value.items()
            if type(before) not in PLAIN and (after := self._field(key, before)) is not before
        }
        if changed:
            value = {**value, **changed}
        keys = tuple(value)
        if keys in self._sorted:
            return value
        rank = self._rank
        for key in keys:
            rank.setdefault(key, len(rank))
        order = tuple(sorted(keys, key=rank.__getitem__))
        if len(self._sorted) < _MOST:
            self._sorted.add(order)
        return value if keys == order else {key: value[key] for key in order}

    def _field(self, key: Any, value: Any) -> Any:
        if key not in self._fields:
            self._fields[key] = KeyOrder()
        return self._fields[key](value)


_MOST = 1000  # sequences of keys that are remembered in one place
