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

from ...prep.annotators import UNKNOWN
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
    "score_chosen": ROW, "score_rejected": ROW,
    "p_win": ROW, "p_lose": ROW, "pair_weight": ROW, "offset": ROW, "eta": ROW, "topk": ROW,
    "slow_chosen_logps": ROW, "slow_rejected_logps": ROW,
    "margin_reward_chosen": VECTOR, "margin_reward_rejected": VECTOR,
    "source_chosen_mean_logps": VECTOR, "source_rejected_mean_logps": VECTOR,
    "preference_levels": ANSWER, "log_target_prob": ANSWER, "proposal_logp": ANSWER,
    "baseline_mean_logps": ANSWER, "undesirable_weight": ANSWER, "reward": ANSWER,
    "aux_logp": TOKEN, "positive_logp": TOKEN, "negative_logp": TOKEN, "old_logp": TOKEN,
    "oracle_logp": TOKEN, "oracle_ref_logp": TOKEN, "value": TOKEN, "old_values": TOKEN,
    "returns": TOKEN, "step_index": TOKEN, "cosine": TOKEN, "step_reward": TOKEN,
    "advantages": EITHER,
    "pairs": PAIRS,
    "annotator": NAME, "user": NAME, "source": NAME,
}  # fmt: skip
INTEGERS = frozenset({"topk", "preference_levels", "step_index", "pairs"})


@dataclass(frozen=True, slots=True)
class Column:
    """One tensor of a loss and the column it is read from."""

    argument: str
    kind: str
    column: str
    loss: str
    instead: str = ""  # what else would supply the tensor

    def missing(self, column: str) -> BadRow:
        also = f"--column {self.argument}=NAME reads another column"
        if column != self.column:
            also += f" ({column.replace(self.column, 'NAME')})"
        if self.instead:
            also += f", and {self.instead} supplies it without one"
        return BadRow(
            column, "missing",
            f"is missing; loss {self.loss!r} reads {self.argument} from it: {WHAT[self.kind]}; "
            f"{also}",
        )  # fmt: skip


def kind_for(argument: str, required: Sequence[str]) -> str:
    """What a row holds for an argument of a loss that requires these tensors."""
    kind = KINDS[argument]
    # a loss over pairs within a list has a number for each of them
    return ALONG if kind == ROW and argument in required and "pairs" in required else kind


def read_columns(
    data: Mapping[str, Any], columns: Sequence[Column], answers: list[str], is_list: bool
) -> dict[str, Any]:
    """The values of a row under the argument names, checked but for their token counts.

    `answers` names the answers' columns. Numbers per answer come back as K floats, numbers per
    token as K lists.
    """
    found: dict[str, Any] = {}
    for column in columns:
        if column.kind == NAME:
            found[column.argument] = _name(data.get(column.column), column.column)
        elif column.kind in (ANSWER, TOKEN, EITHER):
            found[column.argument] = _per_answer(data, column, answers, is_list)
        else:
            value = _get(data, column, column.column)
            found[column.argument] = _per_row(value, column, len(answers))
    for column in columns:
        if column.kind == ALONG and len(found[column.argument]) != len(found["pairs"]):
            raise BadRow(
                column.column, "wrong length",
                f"holds {len(found[column.argument])} numbers for {len(found['pairs'])} pairs",
            )  # fmt: skip
    return found


def _get(data: Mapping[str, Any], column: Column, name: str) -> Any:
    if data.get(name) is None:
        raise column.missing(name)
    return data[name]


def _name(value: Any, column: str) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(column, "wrong type", f"must be {WHAT[NAME]}, got {type(value).__name__}")
    return str(value)


def _per_row(value: Any, column: Column, answers: int) -> Any:
    if column.kind == ROW:
        return _integral(number(value, column.column), column)
    if column.kind == VECTOR and not isinstance(value, list | tuple):
        value = [value]
    if column.kind != PAIRS:
        return floats(value, column.column)
    if not isinstance(value, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in value
    ):
        raise BadRow(column.column, "wrong type", f"must be {WHAT[PAIRS]}")
    pairs = [[int(_integral(number(i, column.column), column)) for i in pair] for pair in value]
    for pair in pairs:
        if not all(0 <= i < answers for i in pair) or pair[0] == pair[1]:
            raise BadRow(
                column.column, "out of range",
                f"holds {pair}, which are not two of {answers} answers (counted from 0)",
            )  # fmt: skip
    return pairs


def _per_answer(
    data: Mapping[str, Any], column: Column, answers: list[str], is_list: bool
) -> list[Any]:
    if is_list:
        values = _get(data, column, column.column)
        if not isinstance(values, list | tuple) or len(values) != len(answers):
            raise BadRow(
                column.column, "wrong length",
                f"must be a list with one entry per answer ({len(answers)})",
            )  # fmt: skip
        names = [f"{column.column}[{i}]" for i in range(len(answers))]
    else:
        single = answers == ["completion"]
        names = [column.column if single else f"{answer}_{column.column}" for answer in answers]
        values = [_get(data, column, name) for name in names]
    out: list[Any] = []
    for value, name in zip(values, names, strict=True):
        listed = isinstance(value, list | tuple)
        if listed != (column.kind == TOKEN) and column.kind != EITHER:
            raise BadRow(name, "wrong type", f"must be {WHAT[column.kind]}")
        many = floats(value, name) if listed else [number(value, name)]
        many = [_integral(x, column) for x in many]
        out.append(many if listed else many[0])
    if len({isinstance(value, list) for value in out}) > 1:
        raise BadRow(column.column, "wrong type", f"must be {WHAT[EITHER]}, alike for all answers")
    return out


def _integral(value: float, column: Column) -> float:
    if column.argument in INTEGERS and value != int(value):
        raise BadRow(column.column, "wrong type", f"must hold integers, got {value}")
    return value


def is_per_token(name: str, value: Any) -> bool:
    """Whether `value`, as `read_columns` gives it, holds a number per token."""
    kind = KINDS[name]
    return kind == TOKEN or (kind == EITHER and isinstance(value[0], list))


def fit_tokens(
    values: Mapping[str, Any], answer: int, count: int, kept: int, column: str
) -> dict[str, np.ndarray]:
    """Numbers per token of one answer with `count` scored tokens, of which the first are kept."""
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
        found[name] = np.asarray(many[:kept], dtype=np.float64)
    return found


def reorder(columns: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The columns of a list whose answers were shuffled: answer k is now the former order[k]."""
    place = {int(old): new for new, old in enumerate(order)}
    out = {}
    for name, value in columns.items():
        if KINDS[name] in (ANSWER, EITHER):
            value = [value[i] for i in order]
        elif KINDS[name] == PAIRS:
            value = [[place[i], place[j]] for i, j in value]
        out[name] = value
    return out


def batch_columns(
    rows: Sequence[Mapping[str, Any]],  # columns of each group
    first: Sequence[int],  # [G] first sequence of each group
) -> dict[str, Any]:
    """By argument name: tensors [G], [G, M], [S] or pairs [M, 2]; names as a list."""
    out: dict[str, Any] = {}
    for name in rows[0]:
        values, kind = [row[name] for row in rows], KINDS[name]
        if kind == NAME:
            out[name] = values
        elif kind == PAIRS:
            moved = [[i + a, j + a] for a, row in zip(first, values, strict=True) for i, j in row]
            out[name] = torch.tensor(moved, dtype=torch.int64).reshape(-1, 2)
        elif kind in (ANSWER, EITHER) or ("pairs" in rows[0] and isinstance(values[0], list)):
            out[name] = _tensor(name, [x for row in values for x in row])
        else:
            out[name] = _tensor(name, values)
    return out


def _tensor(name: str, values: Any) -> Tensor:
    dtype = torch.int64 if name in INTEGERS else torch.float64
    return torch.as_tensor(np.asarray(values), dtype=dtype)


def check_alike(
    rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]],  # name, columns, numbers
    columns: Sequence[Column] = (),
) -> None:
    """Refuses vectors of several lengths, numbers per answer beside numbers per token, and a column
    of names that was asked for and is in no row."""
    for column in columns:
        asked = column.kind == NAME and column.column != column.argument
        if asked and all(values[column.argument] == UNKNOWN for _, values, _ in rows):
            raise ValueError(
                f"no row has a name in column {column.column!r}, from which loss {column.loss!r} "
                f"is told to read {column.argument}; name another column, or none for one name of "
                "all."
            )
    where, first, per_token = rows[0]
    for other, values, numbers in rows[1:]:
        for column in columns:
            name = column.argument
            if column.kind == VECTOR and len(values[name]) != len(first[name]):
                found = f"{len(first[name])} numbers in {where}, {len(values[name])} in {other}"
            elif column.kind == EITHER and (name in numbers) != (name in per_token):
                found = f"{where} and {other} differ"
            else:
                continue
            raise ValueError(f"{name} must be {WHAT[column.kind]}, alike in all rows: {found}.")


def fit_weights(weights: list[float], count: int, appended: bool, column: str) -> np.ndarray:
    """One weight per response token; the appended EOS may be left out and then weighs 1."""
    name = f"{column}_weights"
    if appended and len(weights) == count - 1:
        weights = [*weights, 1.0]
    if len(weights) != count:
        raise BadRow(
            name,
            "wrong length",
            f"holds {len(weights)} numbers for {count} response tokens"
            + (" (the last is EOS, which may be left out)" if appended else ""),
        )
    return np.asarray(weights, dtype=np.float32)
