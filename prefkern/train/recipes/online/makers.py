"""Which rows online rounds make for the losses of a run."""

from __future__ import annotations

from collections.abc import Sequence

from ....losses.record import Loss
from ...config import TrainConfig
from .policy_gradient import AdvantageRows, TargetRows, TokenRewardRows
from .rows import (
    BestRows,
    LevelRows,
    ListRows,
    NegativeRows,
    PairRows,
    RewardRows,
    RowMaker,
)

MAKERS: tuple[type[RowMaker], ...] = (
    TargetRows, TokenRewardRows, AdvantageRows, RewardRows, LevelRows, NegativeRows, ListRows,
    PairRows, BestRows,
)  # fmt: skip


def maker_of(config: TrainConfig, records: Sequence[Loss]) -> RowMaker:
    """The maker of the rows that all the losses train on.

    A loss that reads its best answer alone takes those of the losses beside it.

    Raises:
        ValueError: losses that read different rows, or rows that sampling cannot make.
    """
    kinds: dict[str, type[RowMaker]] = {}
    every = all(record.alone for record in records)
    for record in records:
        among = (BestRows,) if every else MAKERS
        kind = next((kind for kind in among if kind.serves(record)), None)
        if kind is None:
            raise ValueError(
                f"online rounds cannot make the rows that loss {record.name!r} reads: they make "
                "pairs, lists, and single answers for fdpg, rto, grpo and oreo."
            )
        kinds[kind.name] = kind
    if len(kinds) > 1:
        raise ValueError(
            f"losses {[r.name for r in records]} read different rows: {sorted(kinds)}."
        )
    return next(iter(kinds.values()))(config, records)
