"""Extra columns: what a loss reads of a row beside its texts, and how it is stored and batched.

A loss names its tensors (`pref_prob`, `aux_logp`, ...). The table here says what one row of the
data holds for each of them; the column has the same name unless `--column name=column` says
otherwise. Numbers per answer stand in `chosen_NAME` and `rejected_NAME` for pairs, in `NAME` for
single answers, and in `NAME` as a list with one entry per answer for lists.

Shapes: G groups (rows), S sequences (answers), K answers of one row, M numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...prep.cells import BadRow, floats, number

ROW, VECTOR, ANSWER, TOKEN, EITHER, PAIRS, ALONG, NAME, TEXT = (
    "row", "vector", "answer", "token", "either", "pairs", "along", "name", "text",
)  # fmt: skip
WHAT = {
    ROW: "one number per row",
    VECTOR: "a list of numbers per row, equally long in all rows",
    ANSWER: "one number per answer",
    TOKEN: "a list with one number per scored token of each answer, the end token included",
    EITHER: "one number per answer, or a list with one number per scored token of it",
    PAIRS: "a list of [i, j], positions of two answers of the list, the first the better one",
    ALONG: "a list with one number per entry of pairs",
    NAME: "a name (text or integer)",
    TEXT: "a further answer, or its own prompt",
}
# Argument of a loss -> what a row holds for it. Required tensors are read without being asked for;
# optional ones (numbers by default) only where --column names them.
KINDS = {
    "rm_margin": ROW, "pref_prob": ROW, "preference_prob": ROW, "judge_logit_gap": ROW,
    "p_win": ROW, "p_lose": ROW, "pair_weight": ROW, "offset": ROW, "eta": ROW, "topk": ROW,
    "slow_chosen_logps": ROW, "slow_rejected_logps": ROW,
    "margin_reward_chosen": VECTOR, "margin_reward_rejected": VECTOR,
    "source_chosen_mean_logps": VECTOR, "source_rejected_mean_logps": VECTOR,
    "preference_levels": ANSWER, "log_target_prob": ANSWER, "proposal_logp": ANSWER,
    "baseline_mean_logps": ANSWER, "undesirable_weight": ANSWER, "reward": ANSWER,
    "aux_logp": TOKEN, "positive_logp": TOKEN, "negative_logp": TOKEN, "old_logp": TOKEN,
    "value": TOKEN, "step_index": TOKEN, "cosine": TOKEN,
    "advantages": EITHER,
    "pairs": PAIRS,
    "annotator": NAME,
}  # fmt: skip
# Where one name means two things.
KINDS_OF_LOSS = {("soft_pairs", "pref_prob"): ALONG}
INTEGERS = frozenset({"topk", "preference_levels", "step_index", "pairs"})
UNKNOWN = "unknown"  # all rows without a name belong to it


@dataclass(frozen=True, slots=True)
class Extra:
    """One tensor of a loss and the column it is read from."""

    argument: str
    kind: str
    column: str
    loss: str

    def missing(self, column: str) -> BadRow:
        also = f"--column {self.argument}=NAME reads another column"
        if column != self.column:
            also += f" ({column.replace(self.column, 'NAME')})"
        return BadRow(
            column, "missing",
            f"is missing; loss {self.loss!r} reads {self.argument} from it: {WHAT[self.kind]}; "
            f"{also}",
        )  # fmt: skip


def read_extras(
    data: Mapping[str, Any], extras: Sequence[Extra], answers: list[str], is_list: bool
) -> dict[str, Any]:
    """The values of a row under the argument names, checked but for their token counts.

    `answers` names the answers' columns. Numbers per answer come back as K floats, numbers per
    token as K lists.
    """
    found: dict[str, Any] = {}
    for extra in extras:
        if extra.kind == NAME:
            found[extra.argument] = _name(data.get(extra.column), extra.column)
        elif extra.kind in (ANSWER, TOKEN, EITHER):
            found[extra.argument] = _per_answer(data, extra, answers, is_list)
        else:
            value = _get(data, extra, extra.column)
            found[extra.argument] = _per_row(value, extra, len(answers))
    for extra in extras:
        if extra.kind == ALONG and len(found[extra.argument]) != len(found["pairs"]):
            raise BadRow(
                extra.column, "wrong length",
                f"holds {len(found[extra.argument])} numbers for {len(found['pairs'])} pairs",
            )  # fmt: skip
    return found


def _get(data: Mapping[str, Any], extra: Extra, column: str) -> Any:
    if data.get(column) is None:
        raise extra.missing(column)
    return data[column]


def _name(value: Any, column: str) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(column, "wrong type", f"must be {WHAT[NAME]}, got {type(value).__name__}")
    return str(value)


def _per_row(value: Any, extra: Extra, answers: int) -> Any:
    if extra.kind == ROW:
        return _integral(number(value, extra.column), extra)
    if extra.kind == VECTOR and not isinstance(value, list | tuple):
        value = [value]
    if extra.kind != PAIRS:
        return floats(value, extra.column)
    if not isinstance(value, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in value
    ):
        raise BadRow(extra.column, "wrong type", f"must be {WHAT[PAIRS]}")
    pairs = [[int(_integral(number(i, extra.column), extra)) for i in pair] for pair in value]
    for pair in pairs:
        if not all(0 <= i < answers for i in pair) or pair[0] == pair[1]:
            raise BadRow(
                extra.column, "out of range",
                f"holds {pair}, which are not two of {answers} answers (counted from 0)",
            )  # fmt: skip
    return pairs


def _per_answer(
    data: Mapping[str, Any], extra: Extra, answers: list[str], is_list: bool
) -> list[Any]:
    if is_list:
        values = _get(data, extra, extra.column)
        if not isinstance(values, list | tuple) or len(values) != len(answers):
            raise BadRow(
                extra.column, "wrong length",
                f"must be a list with one entry per answer ({len(answers)})",
            )  # fmt: skip
        columns = [f"{extra.column}[{i}]" for i in range(len(answers))]
    else:
        single = answers == ["completion"]
        columns = [extra.column if single else f"{answer}_{extra.column}" for answer in answers]
        values = [_get(data, extra, column) for column in columns]
    out: list[Any] = []
    for value, column in zip(values, columns, strict=True):
        listed = isinstance(value, list | tuple)
        if listed != (extra.kind == TOKEN) and extra.kind != EITHER:
            raise BadRow(column, "wrong type", f"must be {WHAT[extra.kind]}")
        many = floats(value, column) if listed else [number(value, column)]
        many = [_integral(x, extra) for x in many]
        out.append(many if listed else many[0])
    if len({isinstance(value, list) for value in out}) > 1:
        raise BadRow(extra.column, "wrong type", f"must be {WHAT[EITHER]}, alike for all answers")
    return out


def _integral(value: float, extra: Extra) -> float:
    if extra.argument in INTEGERS and value != int(value):
        raise BadRow(extra.column, "wrong type", f"must hold integers, got {value}")
    return value


def fit_tokens(
    values: Mapping[str, Any], answer: int, count: int, kept: slice, column: str
) -> dict[str, np.ndarray]:
    """Numbers per token of one answer with `count` scored tokens, cut as its tokens are."""
    found = {}
    for name, value in values.items():
        if not is_per_token(name, value):
            continue
        many = value[answer]
        if len(many) != count:
            raise BadRow(
                f"{column}_{name}", "wrong length",
                f"holds {len(many)} numbers for {count} scored tokens (the end token included)",
            )  # fmt: skip
        found[name] = np.asarray(many, dtype=np.float64)[kept]
    return found


def is_per_token(name: str, value: Any) -> bool:
    kind = KINDS.get(name)
    return kind == TOKEN or (kind == EITHER and np.ndim(value[0]) > 0)


def reorder(values: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The values of a list whose answers were shuffled: answer k is now the former order[k]."""
    place = {int(old): new for new, old in enumerate(order)}
    out = {}
    for name, value in values.items():
        if KINDS[name] in (ANSWER, TOKEN, EITHER):
            value = [value[i] for i in order]
        elif KINDS[name] == PAIRS:
            value = [[place[i], place[j]] for i, j in value]
        out[name] = value
    return out


def batch_extras(
    rows: Sequence[Mapping[str, Any]],  # values of each group
    first: Sequence[int],  # [G] first sequence of each group
    spans: Sequence[tuple[int, int]],  # [S] scored positions of each sequence, flattened
    shape: tuple[int, int],
) -> dict[str, Any]:
    """Tensors by argument name: [G], [G, M], [S], `shape` per token, [M, 2]; names as a list."""
    out: dict[str, Any] = {}
    for name in rows[0]:
        values, kind = [row[name] for row in rows], KINDS[name]
        if kind == NAME:
            out[name] = values
        elif kind == PAIRS:
            moved = [[i + a, j + a] for a, row in zip(first, values, strict=True) for i, j in row]
            out[name] = torch.tensor(moved, dtype=torch.int64).reshape(-1, 2)
        elif is_per_token(name, values[0]):
            out[name] = _tokens(name, values, spans, shape)
        elif kind in (ANSWER, EITHER) or ("pairs" in rows[0] and isinstance(values[0], list)):
            out[name] = _tensor(name, [x for row in values for x in row])
        else:
            out[name] = _tensor(name, values)
    return out


def check_alike(
    rows: Sequence[tuple[str, Mapping[str, Any]]], extras: Sequence[Extra] = ()
) -> None:
    """Refuses vectors of several lengths, numbers per answer beside numbers per token, and a column
    of names that was asked for and is in no row."""
    for extra in extras:
        asked = extra.kind == NAME and extra.column != extra.argument
        if asked and all(values[extra.argument] == UNKNOWN for _, values in rows):
            raise ValueError(
                f"no row has a name in column {extra.column!r}, from which loss {extra.loss!r} is "
                f"told to read {extra.argument}; name another column, or none for one name of all."
            )
    where, first = rows[0]
    for other, values in rows[1:]:
        for name, value in values.items():
            kind, start = KINDS[name], first[name]
            if kind == VECTOR and len(value) != len(start):
                found = f"{len(start)} numbers in {where}, {len(value)} in {other}"
            elif kind == EITHER and is_per_token(name, value) != is_per_token(name, start):
                found = f"{where} and {other} differ"
            else:
                continue
            raise ValueError(f"{name} must be {WHAT[kind]}, alike in all rows: {found}.")


def _tokens(
    name: str, values: list[Any], spans: Sequence[tuple[int, int]], shape: tuple[int, int]
) -> Tensor:
    flat = np.zeros(shape[0] * shape[1], dtype=np.float32)
    for (start, end), part in zip(spans, (x for row in values for x in row), strict=True):
        flat[start:end] = part
    tokens = torch.from_numpy(flat.reshape(shape))
    return tokens.long() if name in INTEGERS else tokens


def _tensor(name: str, values: Any) -> Tensor:
    dtype = torch.int64 if name in INTEGERS else torch.float64
    return torch.as_tensor(np.asarray(values), dtype=dtype)
