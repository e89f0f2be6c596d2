"""Merging the LoRA adapters of several runs into one."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import models
from ..config import TrainConfig
from ..inputs import new_folder
from ..output import writing

MERGED = "default"  # PEFT writes the adapter of this name into the folder itself


def merge_adapters(
    folders: Sequence[str | Path], output: str | Path, weights: Sequence[float] | None = None
) -> Path:
    """One adapter that changes every weight by sum_i w_i (change by adapter i).

    The linear merge of the adapters of several domains (COFS-DPO). It is exact: the matrices are
    put side by side (PEFT's "cat"), so the rank of the result is the sum of the ranks; a sum of
    the factors themselves would add products of one adapter's A with another's B.

    Args:
        folders: Adapters on the same base model, as runs with lora_r write them.
        output: Folder of the merged adapter, with the first one's tokenizer.
        weights: One number per adapter, default 1 / their count.

    Raises:
        ValueError: fewer than two adapters, weights that do not fit or are not finite, different
            base models, an output folder that is an input or not empty, an adapter or a sum that
            is not finite.
    """
    paths = [str(folder) for folder in folders]
    if len(paths) < 2:
        raise ValueError(f"merging needs at least two adapters, got {len(paths)}.")
    factors = [1.0 / len(paths)] * len(paths) if weights is None else [float(w) for w in weights]
    if not all(map(math.isfinite, factors)) or not any(factors):
        raise ValueError(f"weights must be finite numbers, not all of them 0, got {factors}.")
    if len(factors) != len(paths):
        raise ValueError(f"weights must have one number per adapter ({len(paths)}), got {factors}.")
    for path in paths:
        if not (Path(path) / "adapter_config.json").is_file():
            raise ValueError(f"{path} holds no adapter (no adapter_config.json); merge such only.")
    target = new_folder(output, paths)
    bases = {models.adapter_base(path) for path in paths}
    if len(bases) > 1:
        raise ValueError(
            f"the adapters belong to different base models: {sorted(map(str, bases))}."
        )
    base = models.load_causal_lm(str(bases.pop()), TrainConfig(model=paths[0], dataset=""))
    names = [f"part{i}" for i in range(len(paths))]
    model = _with_adapters(base, names, paths)
    model.add_weighted_adapter(names, factors, adapter_name=MERGED, combination_type="cat")
    _check_finite(model, MERGED, f"the sum with weights {factors}")
    tokenizer = models.load_tokenizer(paths[0])
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".prefkern-merge-", dir=target.parent))
        try:
            model.save_pretrained(str(building), selected_adapters=[MERGED])
            tokenizer.save_pretrained(building)
            building.chmod(0o777 & ~_umask())
            os.replace(building, target)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return target


def _with_adapters(base: Any, names: Sequence[str], paths: Sequence[str]) -> Any:
    """The base with the adapters of the folders `paths` under `names`, whole and finite."""
    from peft import PeftModel

    model = None
    for name, path in zip(names, paths, strict=True):
        with models.told(path, "adapter"):
            if model is None:
                model = PeftModel.from_pretrained(base, path, adapter_name=name)
            else:
                model.load_adapter(path, adapter_name=name)
            models.check_adapter(model, path, name)
        _check_finite(model, name, f"the adapter of {path}")
    return model


def _check_finite(model: Any, adapter: str, what: str) -> None:
    from peft import get_peft_model_state_dict

    for name, weight in get_peft_model_state_dict(model, adapter_name=adapter).items():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{what} is not finite ({name}); nothing is written.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
