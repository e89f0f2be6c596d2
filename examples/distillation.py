"""Distillation from hidden states: a wide teacher, a narrow student, no logits of either.

    python examples/distillation.py

KL(teacher to student), the Jensen-Shannon divergence, and the cross-entropy with the teacher's
four likeliest tokens alone, as a teacher on another machine would send them.
"""

from __future__ import annotations

from typing import Any

import tiny
import torch

import prefkern
from prefkern.integrations.collate import PairCollator
from prefkern.integrations.head import at_head
from prefkern.integrations.head_view import shifted
from prefkern.integrations.preference_model import PreferenceModel


def top_of(teacher: Any, inputs: dict[str, Any], k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """(index, probability) each [B, T, k] of the teacher's likeliest tokens."""
    with torch.no_grad():
        probability, index = teacher(**inputs).logits.softmax(-1).topk(k)
    return index, probability / probability.sum(-1, keepdim=True)


class FromTop(torch.nn.Module):
    """Cross-entropy with a sparse teacher, by the op `xent`."""

    def __init__(self, student: Any, teacher: Any) -> None:
        super().__init__()
        self.student, self._teacher = student, [teacher]
        at_head(student)

    def forward(self, labels: torch.Tensor, **inputs: Any) -> Any:
        targets, values = shifted(labels), top_of(self._teacher[0], inputs)

        def loss(view: Any) -> torch.Tensor:
            stats = prefkern.linear_logps(
                view.hidden, view.head, targets, stats=("xent",), values=values
            )
            return -stats.xent.sum() / (targets != -100).sum()

        return self.student(**inputs, at_head=loss).value, {}


@torch.no_grad()
def distance(student: Any, teacher: Any, rows: list[dict[str, str]]) -> float:
    """KL(teacher to student) per token."""
    step = PreferenceModel(student, "distill", ref=teacher)
    return step(**PairCollator(tiny.tokenizer())(rows)).loss.item()


def main(pairs: int = 480) -> dict[str, dict[str, float]]:
    teacher = tiny.start(hidden=64)
    train, held_out = tiny.pairs(pairs), tiny.pairs(60, seed=1)
    ways = {
        "distill": lambda student: PreferenceModel(student, "distill", ref=teacher),
        "gkd": lambda student: PreferenceModel(student, "gkd", ref=teacher, beta=0.5),
        "xent of four": lambda student: FromTop(student, teacher),
    }
    found = {}
    for name, make in ways.items():
        student = tiny.model(seed=5, hidden=32, layers=1)
        before = distance(student, teacher, held_out)
        tiny.fit(make(student), train, rate=1e-2)
        found[name] = {"before": before, "after": distance(student, teacher, held_out)}
        print(
            f"{name:14s} KL from the teacher per token {before:.3f} to {found[name]['after']:.3f}"
        )
    return found


if __name__ == "__main__":
    main()
