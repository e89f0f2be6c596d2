"""Pairs that share their first steps: where they part, and how sure the search was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .cells import BadRow
from .columns import list_of, number_of, pair_of, refuse_prompt_bound, text_of
from .table import Row, Table, map_rows

WEIGHTS = ("chosen_weights", "rejected_weights")


def divergence_weights(table: Table, *, tokenizer: Any = None, append_eos: bool = True) -> Table:
    """Weighs tokens 0 before the first token in which the two answers differ, and 1 from there on.

    Shared tokens have the same log-probability in both answers and cancel in a difference of sums,
    so the weights matter for per-token means and for losses that look at one answer alone.

    Source: MCTS-DPO (arXiv 2405.00451), authors' code read (log-probabilities are summed from the
    first differing token on); iTool (arXiv 2501.09766) compares fragments in the same spirit.

    Columns in: `chosen_ids`, `rejected_ids` (lists of int, the answers without the prompt, with
    their end token); or, with a tokenizer, the texts `prompt`, `chosen`, `rejected`.
    Columns out: `chosen_weights`, `rejected_weights` (one number per token of the answer); all
    other columns are carried along.

    Args:
        table: Pairs.
        tokenizer: A transformers tokenizer for plain text; the answers then begin where prompt,
            prompt + chosen and prompt + rejected stop agreeing, as in the trainer. Default None:
            the ids are read from the columns.
        append_eos: With a tokenizer: count an EOS after each answer, default True.

    Raises:
        ValueError: Names row and column: answers with the same tokens, one that begins with the
            whole of the other (give the end token), conversations with a tokenizer, weights that
            are there already.
    """

    def weighed(data: Row) -> Iterator[Row]:
        for column in WEIGHTS:
            if data.get(column) is not None:
                raise BadRow(column, "is there already; drop it or multiply by hand")
        ids = _column_ids(data) if tokenizer is None else _ids(data, tokenizer, append_eos)
        start = _shared(*ids)
        for column, tokens in zip(("chosen", "rejected"), ids, strict=True):
            if start == len(tokens):
                raise BadRow(
                    f"{column}_ids" if tokenizer is None else column,
                    f"has no token that differs: its {start} tokens begin the other answer",
                )
        weights = [[0.0] * start + [1.0] * (len(tokens) - start) for tokens in ids]
        yield data | dict(zip(WEIGHTS, weights, strict=True))

    return map_rows(table, weighed)


def shared_steps_to_prompt(table: Table, *, joint: str = "") -> Table:
    """Moves the steps that both answers begin with into the prompt.

    What is left to compare begins with the first differing step, as in step-level preference data
    from a search tree.

    Source: the step pairs of MCTS-DPO (arXiv 2405.00451) and iTool (arXiv 2501.09766), from
    descriptions; how the search picks the two branches is not part of this function.

    Columns in: `prompt` (str), `chosen_steps`, `rejected_steps` (lists of str).
    Columns out: `prompt`, `chosen`, `rejected` (str), `num_shared` (int, steps moved); the step
    columns are gone, other columns are carried along.

    Args:
        table: Pairs of step lists.
        joint: Text between two steps and between prompt and first step, default none.

    Raises:
        ValueError: Names row and column: a step that is not a string, equal lists, one list that
            begins with the whole of the other, a column computed for the old prompt.
    """

    def moved(data: Row) -> Iterator[Row]:
        refuse_prompt_bound(data)
        prompt = text_of(data, "prompt")
        if not isinstance(prompt, str):
            raise BadRow("prompt", "must be a string, since steps are appended to it")
        sides = []
        for column in ("chosen_steps", "rejected_steps"):
            steps = list_of(data, column)
            for k, step in enumerate(steps):
                if not isinstance(step, str):
                    raise BadRow(f"{column}[{k}]", f"must be str, got {type(step).__name__}")
            sides.append(steps)
        start = _shared(*sides)
        for column, steps in zip(("chosen_steps", "rejected_steps"), sides, strict=True):
            if start == len(steps):
                raise BadRow(column, f"its {start} steps begin the other answer; nothing differs")
        rest = {k: v for k, v in data.items() if k not in ("chosen_steps", "rejected_steps")}
        chosen, rejected = (joint.join(steps[start:]) for steps in sides)
        yield rest | {
            "prompt": joint.join([prompt, *sides[0][:start], ""]),
            "chosen": chosen,
            "rejected": rejected,
            "num_shared": start,
        }

    return map_rows(table, moved)


def visit_labels(
    table: Table, *, chosen_visits: str = "chosen_visits", rejected_visits: str = "rejected_visits"
) -> Table:
    """Turns the visit counts of two branches of a search into a soft label.

    confidence = 1 / (1 + v_rejected / max(1, v_chosen)),  pref_prob = max(confidence, 1/2)

    Source: MCTS-DPO (arXiv 2405.00451), authors' code read. The loss `soft_label` reads the label.

    Columns in: `chosen_visits`, `rejected_visits` (numbers >= 0), as `pairs_from_lists(...,
    aligned=("visits",))` writes them.
    Columns out: `pref_prob` in [1/2, 1]; all other columns are carried along.

    Args:
        table: Pairs.
        chosen_visits: Column of the preferred branch, default "chosen_visits".
        rejected_visits: Column of the other, default "rejected_visits".

    Raises:
        ValueError: Names row and column: a count that is missing, negative or not finite.
    """

    def labelled(data: Row) -> Iterator[Row]:
        counts = []
        for column in (chosen_visits, rejected_visits):
            counts.append(number_of(data, column))
            if counts[-1] < 0:
                raise BadRow(column, f"must be at least 0, got {counts[-1]:g}")
        confidence = 1.0 / (1.0 + counts[1] / max(1.0, counts[0]))
        yield data | {"pref_prob": max(confidence, 0.5)}

    return map_rows(table, labelled)


def _shared(a: list, b: list) -> int:
    """Length of the common beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _column_ids(data: Row) -> list[list[int]]:
    found = []
    for column in ("chosen_ids", "rejected_ids"):
        ids = list_of(data, column)
        for i, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise BadRow(f"{column}[{i}]", f"must be int, got {type(token).__name__}")
        found.append(ids)
    return found


def _ids(data: Row, tokenizer: Any, append_eos: bool) -> list[list[int]]:
    """The answers' ids as the trainer cuts them: after the prefix shared with the prompt's ids."""
    prompt, (chosen, rejected) = text_of(data, "prompt"), pair_of(data)
    for column, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str):
            raise BadRow(column, "is a conversation; give chosen_ids and rejected_ids instead")
    eos = tokenizer.eos_token_id
    if eos is None and append_eos:
        raise ValueError(
            "append_eos counts an EOS after each answer, and this tokenizer has no eos_token_id; "
            "set it, or pass append_eos=False."
        )
    texts = [prompt, f"{prompt}{chosen}", f"{prompt}{rejected}"]
    ids = [list(x) for x in tokenizer(texts, verbose=False)["input_ids"]]
    if append_eos:
        ids[1:] = [x if x and x[-1] == eos else [*x, eos] for x in ids[1:]]
    start = min(_shared(ids[0], ids[1]), _shared(ids[0], ids[2]))
    return [x[start:] for x in ids[1:]]
