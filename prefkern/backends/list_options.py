"""Options of the ranking families, their defaults and their text form.

Custom ops carry plain values only, so the options cross them as one canonical string.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple


class ListOptions(NamedTuple):
    """Options of list_rank; each family reads its own (FAMILIES)."""

    weights: str = "none"  # of a pair: none, labeldiff |y_i - y_j|, lambda (gain x discount)
    gain: str = "exp2"  # of a label: exp2 (2^y - 1), linear (y); none for plackett_luce's items
    log_base: str = "e"  # of the discount 1 / log_b(1 + rank): e, 2
    form: str = (
        "dcg"  # of the discount factor: dcg |D(i) - D(j)|, dcg2 |D(k) - D(k+1)|, k = |i - j|
    )
    normalize: bool = False  # divide gains by the ideal DCG
    topn: int = 0  # discount 0 beyond this rank; 0 is no limit
    rank_source: str = "score"  # what ranks come from: score, label
    tie_rank: str = (
        "position"  # equal scores: position order, or average discount of the tied block
    )
    scale_by_list_size: bool = False  # multiply the group by its number of valid items
    pair_reduction: str = "sum"  # over a group's strict pairs: sum, mean
    margin: float = 1.0  # hinge
    ties: str = "strict"  # equal labels in plackett_luce: strict, stable, breslow
    item_gain: str = "none"  # factor of a plackett_luce stage: none, exp2
    target: str = "softmax"  # softmax: sum, none, softmax
    alpha: float = 1.0  # temperature of softmax targets
    mode: str = "margin"  # rank_hinge: the rank gap is the hinge's margin, or its product factor
    scale: float = 1.0  # rank_hinge: of the rank gap
    per_item: bool = False  # rank_hinge: divide the rank gap by the number of valid items
    inner: str = "sum"  # anchor: over the lower items of an anchor, sum or mean
    deviation: float = 1.0  # set_contrast: bias per unit of |y - mean y|
    temperature: float = 1.0  # of the soft ranks of approx_ndcg and neural_ndcg
    sinkhorn_iters: int = 20  # neural_ndcg: rounds of column and row scaling


_PAIR = ("pair_reduction", "scale_by_list_size")
FAMILIES: dict[str, tuple[str, ...]] = {
    "pair": (
        "weights", "gain", "log_base", "form", "normalize", "topn", "rank_source", "tie_rank",
        *_PAIR,
    ),
    "hinge": ("margin", *_PAIR),
    "plackett_luce": ("ties", "item_gain"),
    "softmax": ("target", "alpha"),
    "pro": (),
    "nca": ("alpha",),
    "rank_hinge": ("mode", "scale", "per_item"),
    "anchor": ("inner",),
    "set_contrast": ("deviation",),
    "approx_ndcg": ("temperature",),
    "neural_ndcg": ("temperature", "sinkhorn_iters"),
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
    "inner": ("sum", "mean"),
    "mode": ("margin", "product"),
    "target": ("sum", "none", "softmax"),
}


def pack(family: str, options: dict[str, object]) -> str:
    """Validates `options` for `family` and writes those that differ from their defaults.

    Raises:
        ValueError: unknown family or option (nearest names given), a value out of range.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {tuple(FAMILIES)}, got {family!r}.")
    given: dict[str, Any] = options
    texts = []
    for name, value in sorted(given.items()):
        if name not in FAMILIES[family]:
            near = difflib.get_close_matches(name, FAMILIES[family], n=3) or FAMILIES[family]
            raise ValueError(
                f"family {family!r} takes the options {FAMILIES[family]}, got {name!r}; "
                f"nearest: {', '.join(near) or 'none'}."
            )
        default = ListOptions._field_defaults[name]
        _check(name, value, default)
        if value != default:
            texts.append(f"{name}={int(value) if isinstance(default, bool) else value}")
    found = ListOptions(**given)
    if found.form == "dcg2" and (found.topn or found.tie_rank != "position" or found.normalize):
        raise ValueError(
            "form='dcg2' takes no topn, no normalize and tie_rank='position' (it reads rank "
            "differences), "
            f"got topn={found.topn}, normalize={found.normalize}, tie_rank={found.tie_rank!r}."
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
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"topn must be an int >= 0 (0 is no limit), got {value!r}.")
    elif not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    elif name == "sinkhorn_iters" and (not isinstance(value, int) or value < 1):
        raise ValueError(f"sinkhorn_iters must be an int >= 1, got {value!r}.")
    elif name in ("alpha", "temperature") and value <= 0:
        raise ValueError(f"{name} must be > 0, got {value}.")
