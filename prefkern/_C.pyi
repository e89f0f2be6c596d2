from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

def build_info() -> dict[str, Any]: ...
def cpu_capabilities() -> dict[str, Any]: ...
def plan_batches(
    lengths: ArrayLike,  # [S] integer
    budget: int,
    cu_groups: ArrayLike | None = None,  # [G+1] integer
    *,
    method: Literal["first_fit_decreasing", "in_order"] = "first_fit_decreasing",
    max_groups: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...  # groups [G], cu_batches [B+1]
