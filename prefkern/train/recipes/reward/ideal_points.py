"""PAL: the outputs of the model are the place of an answer, and every user has an ideal point.

S texts, G groups, n outputs, K prototypes, U users.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .... import losses
from ....integrations import hf
from ....losses.listwise.pal import bound_penalty, ideal_point_scores, ideal_points
from ....losses.record import Loss
from ....prep.annotators import UNKNOWN
from ...config import TrainConfig
from ...data import Example, PreferenceBatch
from ...providers import Micro, Opened
from ...reference import ReferenceRows
from .model import Outputs
from .step import ScoreProvider

PART = "ideal_points"  # as losses that are of them call it; also the name of the module's file
USERS = f"{PART}.json"
_COSINE_SCALE, _LARGEST_SCALE = 1.0 / 0.07, 100.0


class Prototypes(nn.Module):
    """K points shared by all users, and K numbers per user."""

    def __init__(self, users: int, prototypes: int, outputs: int, *, cosine: bool) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(prototypes, outputs))
        self.user_logits = nn.Parameter(0.1 * torch.randn(users, prototypes))
        self.log_scale = nn.Parameter(torch.tensor(math.log(_COSINE_SCALE))) if cosine else None

    def forward(self, user: Tensor) -> Tensor:  # [S] -> [S, n]
        return ideal_points(self.points, self.user_logits[user])

    @property
    def scale(self) -> Tensor | float:
        if self.log_scale is None:
            return 1.0
        return self.log_scale.exp().clamp(max=_LARGEST_SCALE)


class IdealPoints(ScoreProvider):
    """Scores of answers for the user who compared them."""

    makes_scores = True

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        parts = {part.name for record in records for part in record.parts}
        return config.head == "reward" and PART in parts

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({PART})

    def reads(self, record: Loss) -> tuple[str, ...]:
        return ("user",)

    def check(self) -> None:
        if (self.config.num_outputs or 1) < 2:
            raise ValueError(
                f"loss {', '.join(self.config.loss)} places answers in a space; set num_outputs to "
                "its dimension, at least 2."
            )
        if len(self.records) > 1 or self.config.output_weights:
            raise ValueError(
                "scores from ideal points are those of all losses of a run, and no weighted sum of "
                "outputs; use that loss alone, without output_weights."
            )

    @property
    def cosine(self) -> bool:
        """The authors' two pairs: distance and hinge, cosine and logistic link."""
        parameters = losses.arguments(self.records[0])
        return self.config.loss_args.get("link", parameters["link"].default) == "logistic"

    def on_policy(self, policy: hf.Model, resume: Path | None, processes: int) -> None:
        self.outputs = policy.config.num_labels

    def on_examples(self, examples: list[Example]) -> list[Example]:
        found = sorted({str(example.columns["user"]) for example in examples})
        if found == [UNKNOWN]:
            raise ValueError(
                "no row has a column 'user' with the name of who compared the answers; --column "
                "user=NAME reads another column."
            )
        if not hasattr(self, "users"):
            stored = Path(self.config.model) / USERS
            known = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else []
            self.users = [*known, *(name for name in found if name not in known)]
            self.known = len(known)
            self.module = self._build()
        if new := [name for name in found if name not in self.users]:
            raise ValueError(
                f"user {new[0]!r} of eval_dataset has no row in dataset, so there is nothing to "
                "place them by."
            )
        return examples

    def open(self, opened: Opened) -> None:
        self.module.to(opened.device)
        if not opened.training and self.known < len(self.users):
            raise ValueError(
                f"user {self.users[self.known]!r} is none of those that {self.config.model} was "
                "trained for."
            )

    def _build(self) -> Prototypes:
        """The points, as an earlier run left them where the model came out of one."""
        torch.manual_seed(self.config.seed)  # whatever loading drew, the points start the same
        module = Prototypes(
            len(self.users), self.config.prototypes, self.outputs, cosine=self.cosine
        )
        stored = Path(self.config.model) / f"{PART}.safetensors"
        if stored.is_file():
            self._take(module, load_file(stored), stored)
        return module

    def _take(self, module: Prototypes, state: dict[str, Tensor], stored: Path) -> None:
        """The points of an earlier run; users it did not have keep their start."""
        logits = module.user_logits.detach().clone()
        found = state["user_logits"]
        fits = found.shape == (self.known, logits.shape[1]) and set(state) == set(
            module.state_dict()
        )
        if not fits or state["points"].shape != module.points.shape:
            raise ValueError(
                f"{stored} holds {list(state['points'].shape)} prototypes, this run has "
                f"{list(module.points.shape)}; set prototypes, num_outputs and link alike."
            )
        logits[: self.known] = found
        module.load_state_dict({**state, "user_logits": logits})

    def modules(self) -> dict[str, nn.Module]:
        return {PART: self.module}

    def parameter_group(self, name: str) -> tuple[str, dict[str, Any]] | None:
        if not name.startswith(f"{PART}."):
            return None
        rate = self.config.prototype_learning_rate
        rate = self.config.learning_rate if rate is None else rate
        return PART, {"weight_decay": 0.0, "lr": rate}

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        batch = micro.batch
        index = [self.users.index(str(name)) for name in batch.columns["user"]]
        device = batch.input_ids.device
        self.user = torch.tensor(index, device=device)  # [G]
        self.each = self.user.repeat_interleave(batch.cu_groups.diff().long())  # [S]
        return {}

    def scores(self, outputs: Outputs, batch: PreferenceBatch) -> Tensor:
        measure = "cosine" if self.cosine else "distance"
        return ideal_point_scores(
            outputs.values, self.module(self.each), measure=measure, scale=self.module.scale
        )

    def penalty(self, batch: PreferenceBatch) -> Tensor | None:
        """The authors' bound on the length of ideal points."""
        return None if self.cosine else bound_penalty(self.module(self.user))

    def save(self, folder: Path) -> None:
        (folder / USERS).write_text(json.dumps(self.users), encoding="utf-8")

    save_final = save
