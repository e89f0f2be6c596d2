"""Data of prefkern's losses under TRL's trainers: what a data set must hold, and its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import batches
from .plan import LossPlan

# Columns of which KTOTrainer can make its rows.
_ANSWERS = (("completion", "label"), ("chosen", "rejected"), ("completion_ids", "label"))


class LossData:
    """The part of `PreferenceLosses` that meets data."""

    plan: LossPlan | None
    rows = "pairs"  # what a row of the trainer's own data holds: "pairs" or "answers"
    _columns: dict[str, str]  # argument of a loss -> column

    @property
    def _many(self) -> bool:
        """Rows of the data set hold a list of answers, or three of them."""
        plan = self.plan
        return plan is not None and (plan.needs.lists or len(plan.needs.roles) > 2)

    def _answers(self, plan: LossPlan) -> list[str]:
        """Columns that hold the answers where there are many."""
        if plan.needs.lists:
            return ["completions"]
        return [plan.columns.get(role, role) for role in plan.needs.roles]

    def _check_datasets(self, arguments: dict[str, Any]) -> None:
        plan = self.plan
        self._columns = (
            {} if plan is None else {n: plan.columns.get(n, n) for n in plan.needs.columns}
        )
        held = arguments.get("eval_dataset")
        others = held if isinstance(held, dict) else {"eval_dataset": held}
        for name, dataset in {"train_dataset": arguments.get("train_dataset"), **others}.items():
            if dataset is None:
                continue
            row = next(iter(dataset), None)
            if row is None:
                raise ValueError(f"{name} is empty.")
            if isinstance(row, Mapping):  # TRL refuses what is no data set
                self._check_columns(list(row))
                self._check_cells(row)

    def _check_cells(self, row: Mapping[str, Any]) -> None:
        """The columns of a first row that losses read, and its images."""
        for argument, column in self._columns.items():
            for name in batches.column_names(list(row), {argument: column}):
                batches.check_cell(name, row[name], single=argument == "item_weights")
        if self.plan is not None and {"image", "images"} & row.keys():
            self._check_images(self.plan, row)

    def _check_columns(self, found: Sequence[str]) -> None:
        plan = self.plan
        names = "this loss_type" if plan is None else f"loss {', '.join(plan.names)}"
        if self.rows == "pairs" and not self._many:
            if not ({"chosen", "rejected"} <= set(found) or "chosen_ids" in found):
                raise ValueError(
                    f"{names} trains on pairs, columns (prompt,) chosen and rejected, got "
                    f"{sorted(found)}; ranked lists (completions, scores) go with losses of the "
                    "listwise family, single answers (completion, label) with KTOTrainer."
                )
        elif self.rows == "answers":
            if not any(set(c) <= set(found) for c in _ANSWERS):
                raise ValueError(
                    f"{names} trains on single answers, columns prompt, completion and label, or "
                    f"on pairs, which it takes apart, got {sorted(found)}."
                )
        elif self._many and plan is not None:
            wanted = ["prompt", *self._answers(plan), *(["scores"] if plan.needs.lists else [])]
            if missing := [c for c in wanted if c not in found and "completion_ids" not in found]:
                raise ValueError(
                    f"{names} trains on rows with the columns {', '.join(wanted)}, got "
                    f"{sorted(found)}: no {', '.join(missing)}. scores holds a number per answer, "
                    "higher is better."
                )
        batches.check_columns(found, self._columns, names)

    def _check_images(self, plan: LossPlan, row: Mapping[str, Any]) -> None:
        """Rows with images are tokenised in TRL's collator, which knows pairs and single answers
        and says nothing of where an answer's tokens come to lie."""
        names = ", ".join(plan.names)
        if self._many:
            raise ValueError(
                f"loss {names} reads more than two answers of a row, and rows with images are "
                "pairs (prompt, chosen, rejected); drop the images, or use a loss of pairs."
            )
        columns = batches.column_names(list(row), self._columns)
        if by_token := [c for c in columns if isinstance(row[c], list)]:
            raise ValueError(
                f"loss {names} reads lists from {', '.join(by_token)}; rows with images can bring "
                "a number per row or per answer, none per token."
            )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        if not self._many or "completion_ids" in next(iter(dataset)):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)  # type: ignore[misc]
        assert self.plan is not None
        return batches.tokenize_answers(
            dataset, processing_class, self._answers(self.plan), max_length=args.max_length
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        more = ["prompt_ids", "completion_ids", "scores"] if self._many else []
        for column in self._columns.values():
            more += [column, f"chosen_{column}", f"rejected_{column}"]
        trainer: Any = self
        known: list[str] = trainer._signature_columns
        trainer._signature_columns = [*known, *(c for c in more if c not in known)]

    def _use_collator(self, own: bool) -> None:
        """`own`: the caller gave no collator, so lists get ours."""
        trainer: Any = self
        if self._many and own:
            assert self.plan is not None
            trainer.data_collator = batches.AnswersCollator(
                trainer._tokenizer.pad_token_id,
                trainer.args.max_length,
                trainer.args.pad_to_multiple_of,
                scores="scores" if self.plan.needs.lists else None,
            )
        if self._columns:
            rows = "lists" if self._many else self.rows
            trainer.data_collator = batches.WithColumns(
                trainer.data_collator, self._columns, rows, trainer.args.max_length
            )
