"""Reference log-probabilities written once and read by later runs.

One safetensors file: `logp` [n] fp32, one number per scored token in the order of the data, and
`cu_seqlens` [S+1]. Its name and metadata carry a key over the data, the weights and the precision;
a run that differs in any of them refuses the file.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..integrations import hf
from .config import TrainConfig
from .config import fingerprint as short_hash
from .data import Example, collate, fingerprint
from .models import weights_hash

FORMAT = "prefkern-reference-logps-1"


def cache_key(examples: list[Example], model: nn.Module, config: TrainConfig) -> dict[str, str]:
    """What the numbers of a cache depend on."""
    scale, softcap = hf.logit_options(hf.text_config(model))
    return {
        "format": FORMAT,
        "data": fingerprint(examples),
        "weights": weights_hash(model),
        "compute": f"{config.dtype},bf16={config.bf16},scale={scale:g},softcap={softcap}",
    }


def cache_name(key: dict[str, str]) -> str:
    return f"ref_logps-{short_hash(key)}.safetensors"


class ReferenceCache:
    """Per-token reference log-probabilities of a data set, looked up by example."""

    def __init__(self, logp: Tensor, cu_seqlens: Tensor, examples: list[Example]) -> None:
        self.logp, self.cu_seqlens = logp, cu_seqlens  # [n], [S+1]
        first = np.cumsum([0] + [len(e.sequences) for e in examples])
        self.first_sequence = first  # [G+1]
        if int(first[-1]) + 1 != cu_seqlens.numel():
            raise ValueError(
                f"the cache holds {cu_seqlens.numel() - 1} sequences, the data {int(first[-1])}."
            )

    def token_logps(self, indices: Sequence[int], targets: Tensor) -> Tensor:
        """[B, T] like `targets` of the collated examples `indices`; 0 where nothing is scored."""
        parts = []
        for i in indices:
            a, b = self.first_sequence[i], self.first_sequence[i + 1]
            parts.append(self.logp[int(self.cu_seqlens[a]) : int(self.cu_seqlens[b])])
        values = torch.cat(parts).to(targets.device)
        scored = targets != -100
        if values.numel() != int(scored.sum()):
            raise ValueError(
                f"the cache has {values.numel()} numbers for a batch with {int(scored.sum())} "
                "scored tokens; write it again with `prefkern precompute`."
            )
        return torch.zeros_like(targets, dtype=torch.float32).masked_scatter(scored, values)

    @classmethod
    def load(cls, path: str, examples: list[Example], key: dict[str, str]) -> ReferenceCache:
        """Reads `path` (file, or folder with one file per key); refuses another run's numbers."""
        file = Path(path) / cache_name(key) if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(
                f"{file} does not exist: no reference log-probabilities for this data, model and "
                "precision; write them with `prefkern precompute` and the same options."
            )
        with safe_open(file, "pt") as stored:
            found = stored.metadata() or {}
            different = [name for name, value in key.items() if found.get(name) != value]
            if different:
                raise ValueError(
                    f"{file} was computed for other {' and '.join(different)} than this run has; "
                    "write it again with `prefkern precompute`."
                )
            return cls(stored.get_tensor("logp"), stored.get_tensor("cu_seqlens"), examples)


@torch.no_grad()
def compute(
    model: nn.Module,
    examples: list[Example],
    config: TrainConfig,
    *,
    packed: bool,
    pad_id: int,
    device: torch.device,
    progress: Iterable[int] | None = None,
) -> tuple[Tensor, Tensor]:  # [n], [S+1]
    """Log-probabilities of every scored token of every sequence, in the order of `examples`."""
    size = config.per_device_eval_batch_size
    parts = []
    for start in progress if progress is not None else range(0, len(examples), size):
        batch = collate(examples[start : start + size], packed=packed, pad_id=pad_id).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bf16):
            logp = hf.fused_logps(
                model,
                batch.input_ids,
                batch.targets,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                backend=config.backend,
            )
        parts.append(logp[batch.targets != -100].cpu())
    lengths = [seq.length for example in examples for seq in example.sequences]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)
    return torch.cat(parts), cu_seqlens


def write(
    folder: Path,
    logp: Tensor,
    cu_seqlens: Tensor,
    key: dict[str, str],
    about: dict[str, str] | None = None,
) -> Path:
    """Writes the cache under its key; the file appears complete or not at all.

    `about` goes into the metadata beside the key and is not part of the name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / cache_name(key)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"logp": logp, "cu_seqlens": cu_seqlens}, partial, metadata=key | (about or {}))
    os.replace(partial, path)
    return path
