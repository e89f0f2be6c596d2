"""Options of the ranking families, their defaults and their text form.

Custom ops carry plain values only, so the options cross them as one canonical string.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple


class ListOptions(NamedTuple):
    """Options of list_rank; each family reads its own (FAMILIES)."""

    weights: str = "none"  # of a pair: none, labeldiff |y_i - y_j|, lambda (gain x discount)
    gain: str = "exp2"  # of a label in lambda weights: exp2 (2^y - 1), linear (y)
    log_base: str = "e"  # of the discount 1 / log_b(1 + rank): e, 2
    form: str = "dcg"  # of the discount factor: dcg |D(i) - D(j)|, dcg2 |D(|i-j|) - D(|i-j| + 1)|
    normalize: bool = False  # divide gains by the ideal DCG
    topn: int = 0  # discount 0 beyond this rank; 0 is no limit
    rank_source: str = "score"  # what ranks come from: score, label
    tie_rank: str = "position"  # equal scores: position order, or average discount of their block
    scale_by_list_size: bool = False  # multiply the group by its number of valid items
    pair_reduction: str = "sum"  # over a group's strict pairs: sum, mean
    ties: str = "strict"  # equal labels in plackett_luce: strict, stable, breslow
    item_gain: str = "none"  # factor of a plackett_luce stage: none, exp2
    target: str = "softmax"  # softmax: sum, none, softmax
    alpha: float = 1.0  # temperature of softmax targets


FAMILIES: dict[str, tuple[str, ...]] = {
    "pair": (
        "weights", "gain", "log_base", "form", "normalize", "topn", "rank_source", "tie_rank",
        "scale_by_list_size", "pair_reduction",
    ),
    "plackett_luce": ("ties", "item_gain"),
    "softmax": ("target", "alpha"),
}  # fmt: skip
_CHOICES = {
    "weights": ("none", "labeldiff", "lambda"),
    "gain": ("exp2", "linear"),
    "log_base": ("e", "2"),
    "form": ("dcg", "dcg2"),
    "rank_source": ("score", "label"),
    "tie_rank": ("position", "average"),
    "pair_reduction": ("sum", "mean"),
    "ties": ("strict", "stable", "breslow"),
    "item_gain": ("none", "exp2"),
    "target": ("sum", "none", "softmax"),
}
MOST = 2**31 - 1  # items that int32 boundaries can count


def pack(family: str, options: dict[str, Any]) -> str:
    """Validates `options` for `family` and writes those that differ from their defaults.

    Raises:
        ValueError: unknown family or option (nearest names given), a value out of range.
    """
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"family must be one of {tuple(FAMILIES)}, got {family!r}.")
    known = FAMILIES[family]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known
            raise ValueError(
                f"family {family!r} takes the options {known}, got {name!r}; "
                f"nearest: {', '.join(near)}."
            )
    texts = []
    for name in filter(options.__contains__, known):
        value, default = options[name], ListOptions._field_defaults[name]
        _check(name, value, default)
        if value != default:
            # through the number's own type, which a compiler can turn to text where it is symbolic
            if isinstance(default, float):
                value = float(value)
            elif not isinstance(default, str):
                value = int(value)
            texts.append(f"{name}={value}")
    found = ListOptions(**options)
    if found.form == "dcg2" and (found.topn or found.tie_rank != "position" or found.normalize):
        raise ValueError(
            "form='dcg2' takes no topn, no normalize and tie_rank='position' (it reads rank "
            f"differences), got topn={found.topn}, normalize={found.normalize}, "
            f"tie_rank={found.tie_rank!r}."
        )
    return ";".join(texts)


def unpack(text: str) -> ListOptions:
    """The inverse of `pack`."""
    values: dict[str, Any] = {}
    for item in filter(None, text.split(";")):
        name, _, raw = item.partition("=")
        default = ListOptions._field_defaults[name]
        values[name] = bool(int(raw)) if isinstance(default, bool) else type(default)(raw)
    return ListOptions(**values)


def _check(name: str, value: object, default: object) -> None:
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {_CHOICES[name]}, got {value!r}.")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}.")
    elif name == "topn":
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
            raise ValueError(
                f"topn must be an int from 0 (no limit) to {MOST}, got {value!r}; use 0 for all."
            )
    elif (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0.0 < value < float("inf")
    ):
        raise ValueError(f"alpha must be a finite number > 0, got {value!r}.")
