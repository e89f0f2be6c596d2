"""Log-probabilities written once by `prefkern precompute` and read by later runs.

One safetensors file: `logp` [n] fp32, one number per scored token in the order of the data, and
`cu_seqlens` [S+1]. Its name and metadata carry a key over the data, the weights and the precision;
a run that needs the numbers of its own reference refuses a file that differs in any of them, and
one that reads another model's finds it by data or rows alone.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..integrations import hf
from ..ops.segment_sum import segment_sum
from .config import TrainConfig, short_hash
from .data import Example, PreferenceBatch, collate, data_hash
from .deal import deal
from .models import weights_hash
from .output import writing
from .processes import Processes
from .reference import token_logps

FORMAT = "prefkern-reference-logps-1"


class StoredLogps(NamedTuple):
    """What a cache holds."""

    logp: Tensor  # [n] one number per scored token
    cu_seqlens: Tensor  # [S+1]


def cache_key(examples: list[Example], model: nn.Module, config: TrainConfig) -> dict[str, str]:
    """What the numbers of a cache depend on."""
    scale, softcap = hf.logit_options(hf.text_config(model))
    return {
        "format": FORMAT,
        "data": data_hash(examples),
        "weights": weights_hash(model),
        "compute": f"{config.dtype},bf16={config.bf16},scale={scale:g},softcap={softcap}",
    }


def rows_key(examples: Sequence[Example]) -> str:
    """Which texts these are, in order, whatever the tokenizer."""
    return short_hash([example.text for example in examples])


def cache_name(key: dict[str, str]) -> str:
    return f"ref_logps-{short_hash(key)}.safetensors"


def read(path: str, key: dict[str, str]) -> StoredLogps:
    """Reads `path` (file, or folder with one file per key); refuses another run's numbers."""
    file = Path(path) / cache_name(key) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist: no reference log-probabilities for this data, model and "
            "precision; write them with `prefkern precompute` and the same options."
        )
    with _opened(file) as stored:
        found = stored.metadata() or {}
        different = [name for name, value in key.items() if found.get(name) != value]
        if different:
            raise ValueError(
                f"{file} was computed for other {' and '.join(different)} than this run has; "
                "write it again with `prefkern precompute`."
            )
        return StoredLogps(stored.get_tensor("logp"), stored.get_tensor("cu_seqlens"))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A cache to read from.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        with safe_open(file, "pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is not a whole file of `prefkern precompute` ({error}); write it again."
        ) from error


def find(path: str | Path, examples: list[Example], *, same_tokens: bool) -> StoredLogps:
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
    data, rows = data_hash(examples), rows_key(examples)
    found: list[tuple[str, StoredLogps]] = []
    for file in files:
        with _opened(file) as stored:
            about = stored.metadata() or {}
            fits = about.get("data") == data or (not same_tokens and about.get("rows") == rows)
            if about.get("format") == FORMAT and fits:
                logps = StoredLogps(stored.get_tensor("logp"), stored.get_tensor("cu_seqlens"))
                found.append((file.name, logps))
    if not found:
        what = "tokens" if same_tokens else "rows"
        raise ValueError(
            f"{path} was computed for other {what} than this data set has ({len(examples)} rows); "
            "run `prefkern precompute --model SOURCE` with the same data options."
        )
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise ValueError(f"{path} holds several caches of these rows ({names}); name one file.")
    _check_count(found[0][1], examples)
    return found[0][1]


def _check_count(stored: StoredLogps, examples: list[Example]) -> None:
    sequences = sum(len(example.sequences) for example in examples)
    if stored.cu_seqlens.numel() != sequences + 1:
        raise ValueError(
            f"the cache holds {stored.cu_seqlens.numel() - 1} sequences, the data {sequences}."
        )


def attach(examples: list[Example], name: str, stored: StoredLogps) -> list[Example]:
    """The examples with the cache's numbers under `name`, one per scored token.

    Raises:
        ValueError: a sequence has another number of scored tokens than the cache.
    """
    _check_count(stored, examples)
    numbers, ends = stored.logp.numpy(), iter(itertools.pairwise(stored.cu_seqlens.tolist()))
    out = []
    for example in examples:
        sequences = []
        for seq in example.sequences:
            a, b = next(ends)
            if b - a != seq.length:
                raise ValueError(
                    f"the cache has {b - a} numbers for an answer of row {example.row} with "
                    f"{seq.length} scored tokens; write it again with `prefkern precompute`."
                )
            sequences.append(replace(seq, numbers={**seq.numbers, name: numbers[a:b]}))
        out.append(replace(example, sequences=tuple(sequences)))
    return out


def mean_logps(stored: StoredLogps) -> Tensor:  # [S] fp64
    """Mean log-probability of every sequence over the cache's own tokens of it."""
    lengths = stored.cu_seqlens.diff().clamp(min=1)
    return segment_sum(stored.logp, stored.cu_seqlens) / lengths


Read = Callable[[nn.Module, PreferenceBatch, TrainConfig], Tensor]


def compute(
    model: nn.Module,
    examples: list[Example],
    config: TrainConfig,
    *,
    packed: bool,
    pad_id: int,
    read: Read = token_logps,
) -> StoredLogps:
    """Log-probabilities of every scored token of every sequence, in the order of `examples`.

    `read` may give other numbers [B, T] of a batch under the model.
    """
    chunks = batches_of(examples, config)
    parts = [read_batch(model, chunk, config, packed=packed, pad_id=pad_id, read=read)
             for chunk in chunks]  # fmt: skip
    return joined(parts, examples)


def compute_shared(
    model: nn.Module,
    examples: list[Example],
    config: TrainConfig,
    processes: Processes,
    *,
    packed: bool,
    pad_id: int,
    progress: Callable[[list[Any]], Iterable[Any]],
) -> StoredLogps | None:
    """As `compute`, the batches dealt out to the processes, which all call it; the main one returns
    all numbers, the others None. `progress` wraps the batches of this process."""
    chunks = batches_of(examples, config)
    numbers = [[number] for number in range(len(chunks))]
    mine = []
    for (number,), real in progress(list(deal(numbers, processes.rank, processes.world))):
        # one batch too few: a sharded model must be called as often as in the other processes
        logps = read_batch(model, chunks[number], config, packed=packed, pad_id=pad_id)
        if real:
            mine.append(logps)
    shares = processes.to_main(mine)
    if shares is None:
        return None
    turns = itertools.zip_longest(*shares)
    return joined([part for turn in turns for part in turn if part is not None], examples)


def batches_of(examples: list[Example], config: TrainConfig) -> list[list[Example]]:
    size = config.per_device_eval_batch_size
    return [examples[i : i + size] for i in range(0, len(examples), size)]


@torch.no_grad()
def read_batch(
    model: nn.Module,
    examples: list[Example],
    config: TrainConfig,
    *,
    packed: bool,
    pad_id: int,
    read: Read = token_logps,
) -> Tensor:  # [n], the scored tokens of the batch, on the CPU
    device = next(model.parameters()).device
    batch = collate(examples, packed=packed, pad_id=pad_id).to(device)
    return read(model, batch, config)[batch.targets != -100].cpu()


def joined(parts: list[Tensor], examples: list[Example]) -> StoredLogps:
    """The numbers of all batches, in their order."""
    lengths = [seq.length for example in examples for seq in example.sequences]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)
    return StoredLogps(torch.cat(parts), cu_seqlens)


def write(
    folder: Path,
    stored: StoredLogps,
    key: dict[str, str],
    about: dict[str, str] | None = None,
) -> Path:
    """Writes the cache under its key; the file appears complete or not at all.

    `about` goes into the metadata beside the key and is not part of the name.
    """
    path = folder / cache_name(key)
    partial = path.with_name(f".prefkern-{path.name}.{os.getpid()}.tmp")
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(stored._asdict(), partial, metadata=key | (about or {}))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path
