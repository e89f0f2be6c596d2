"""Log-probabilities of further models, read from caches that `prefkern precompute` wrote.

Several of them fuse into one reference (InfiFPO); those of a DPO-trained model are token rewards
(TGDPO, RTO). G groups, M models, S sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..integrations import hf
from .config import TrainConfig
from .config import fingerprint as short_hash
from .data import Example, fingerprint
from .judges import answer_logps
from .reference_cache import FORMAT, ReferenceCache

# What infifpo reads of a pair.
COLUMNS = ("source_chosen_mean_logps", "source_rejected_mean_logps")


def rows_key(examples: Sequence[Example]) -> str:
    """Which texts these are, in order, whatever the tokenizer."""
    return short_hash([example.text for example in examples])


def find_cache(path: str | Path, examples: list[Example], *, same_tokens: bool) -> ReferenceCache:
    """The cache in `path` (a file, or a folder with one per data set) that belongs to `examples`.

    The model that wrote it may be any. `same_tokens`: the cache must hold one number for each token
    of the examples; otherwise the rows must be the same and the tokens may be another tokenizer's.

    Raises:
        ValueError: no such cache, or more than one in the folder.
    """
    path = Path(path)
    files = sorted(path.glob("ref_logps-*.safetensors")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise ValueError(
            f"{path} holds no log-probabilities; write them with `prefkern precompute --model "
            "SOURCE` and the same data options."
        )
    data, rows = fingerprint(examples), rows_key(examples)
    found: list[tuple[Path, Tensor, Tensor]] = []
    for file in files:
        with safe_open(file, "pt") as stored:
            about = stored.metadata() or {}
            fits = about.get("data") == data or (not same_tokens and about.get("rows") == rows)
            if about.get("format") == FORMAT and fits:
                found.append((file, stored.get_tensor("logp"), stored.get_tensor("cu_seqlens")))
    if not found:
        what = "tokens" if same_tokens else "rows"
        raise ValueError(
            f"{path} was computed for other {what} than this data set has ({len(examples)} rows); "
            "run `prefkern precompute --model SOURCE` with the same data options."
        )
    if len(found) > 1:
        names = ", ".join(file.name for file, _, _ in found)
        raise ValueError(f"{path} holds several caches of these rows ({names}); name one file.")
    return ReferenceCache(found[0][1], found[0][2], examples)


def mean_logps(cache: ReferenceCache) -> Tensor:  # [S] fp64
    """Mean log-probability of every sequence over the cache's own tokens of it."""
    ends = cache.cu_seqlens
    running = torch.cat([torch.zeros(1, dtype=torch.float64), cache.logp.double().cumsum(0)])
    return (running[ends[1:]] - running[ends[:-1]]) / (ends[1:] - ends[:-1]).clamp(min=1)


def with_sources(examples: list[Example], paths: Sequence[str | Path]) -> list[Example]:
    """Pairs with infifpo's columns: mean log-probabilities under each source model [M].

    The loss itself clips them against the policy's start and chooses among them
    (`losses.pairwise.infifpo.fused_reference`).

    Raises:
        ValueError: no source, data that are not pairs, a cache of other rows, a value that is not
            finite.
    """
    if not paths:
        raise ValueError("a fused reference needs at least one source, got none.")
    if any(len(example.sequences) != 2 for example in examples):
        raise ValueError("fused_ref fuses references of pairs; the data are not pairs.")
    means = torch.stack(
        [mean_logps(find_cache(path, examples, same_tokens=False)) for path in paths], 1
    ).view(len(examples), 2, len(paths))  # [G, 2, M]
    if not bool(means.isfinite().all()):
        row = int((~means.isfinite()).nonzero()[0][0])
        raise ValueError(f"a source's log-probabilities of row {examples[row].row} are not finite.")
    return [
        dataclasses.replace(
            example,
            values=(example.values or {}) | dict(zip(COLUMNS, both.tolist(), strict=True)),
        )
        for example, both in zip(examples, means, strict=True)
    ]


def aux_caches(config: TrainConfig, *data: list[Example]) -> list[ReferenceCache | None]:
    """The cache of precomputed_aux for each of several data sets; None where there is nothing."""
    if config.precomputed_aux is None:
        return [None for _ in data]
    path = config.precomputed_aux
    return [find_cache(path, part, same_tokens=True) if part else None for part in data]


def with_token_rewards(
    rows: Sequence[Mapping[str, Any]], model: hf.Model, tokenizer: Any, config: TrainConfig
) -> list[dict[str, Any]]:
    """Rows of pairs with `chosen_aux_logp` and `rejected_aux_logp`: per token, under `model`.

    The columns by which tgdpo reads a DPO-trained model (--column aux_logp=aux_logp). Rows that the
    model or the tokenizer cannot take are left out.

    Args:
        rows: With `prompt`, `chosen` and `rejected` as text.
        model: Any causal model over the policy's tokens, for instance the result of a dpo run.
        tokenizer: The policy's.
        config: max_length, append_eos, dtype and backend are read.
    """
    sides = [
        answer_logps(model, tokenizer, rows, [row[side] for row in rows], config)
        for side in ("chosen", "rejected")
    ]
    return [
        {**row, "chosen_aux_logp": one.tolist(), "rejected_aux_logp": other.tolist()}
        for row, one, other in zip(rows, *sides, strict=True)
        if one is not None and other is not None
    ]
