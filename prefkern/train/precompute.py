"""`prefkern precompute`: reference log-probabilities of a data set, once for many runs."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from ..integrations.head import at_head
from . import inputs, models, output, pairing, reference_cache, sharded
from .config import TrainConfig
from .data import data_hash
from .data_providers import roles_of
from .demands import losses_of
from .processes import Processes, make_accelerator
from .run import make_loader, pad_id, say
from .together import ended_together


def precompute(config: TrainConfig) -> list[Path]:
    """Writes one cache for `dataset` and one for `eval_dataset` into output_dir; returns the paths.

    The reference is `ref_model`, else `model`, as it would be in training. Several processes share
    the batches out and, as accelerate's file says, the model; the numbers are those of one process.

    Raises:
        ValueError: every mistake of the user's, with what to do; tensor parallelism, under which
            the numbers would be others.
    """
    with ended_together():
        return _precompute(config)


def _precompute(config: TrainConfig) -> list[Path]:
    accelerator = make_accelerator(config)
    processes = Processes.of(accelerator)
    if processes.tensor_parallel > 1:
        raise ValueError(
            "precompute does not run under tensor parallelism, which sums in another order than "
            "one process does; set distributed_type: MULTI_GPU or FSDP in accelerate's file."
        )
    folder, tell = Path(config.output_dir), partial(say, accelerator)

    def check() -> None:
        output.check_writable(folder)
        inputs.check_inputs(config)

    processes.from_main(check)
    tokenizer = models.load_tokenizer(config.model)
    model = models.freeze(models.load_model(config.ref_model or config.model, config))
    sources = [(config.dataset, config.dataset_split, config.limit)]
    if config.eval_dataset is not None:
        sources.append((config.eval_dataset, config.eval_split, config.eval_limit))
    # answers beside chosen and rejected are scored too, where the loss reads them
    roles = roles_of(losses_of(config), config)
    loader = dataclasses.replace(make_loader(config, tokenizer, model), roles=roles)
    data = []
    for source, split, limit in sources:
        loaded = loader.load(source, split, limit)
        tell(f"{source}: {loaded.report}")
        pairing.check_tokens(config.ref_model or config.model, config, loaded.examples)
        data.append(loaded.examples)
    processes.check_same(config, data=[data_hash(examples) for examples in data])
    # of the whole model, which the main process has at this point
    keys = processes.from_main(
        lambda: [reference_cache.cache_key(examples, model, config) for examples in data]
    )
    at_head(model)
    model = sharded.place(accelerator, model)
    pairing.check_own_logits(model, config)
    packed = pairing.choose_packing(tell, model, data[0], config)
    silent = config.disable_tqdm or not accelerator.is_main_process
    paths = []
    for examples, key in zip(data, keys, strict=True):
        stored = reference_cache.compute_shared(
            model, examples, config, processes, packed=packed, pad_id=pad_id(tokenizer, model),
            progress=partial(tqdm, disable=silent),
        )  # fmt: skip
        about = {"rows": reference_cache.rows_key(examples)}
        paths.append(processes.from_main(partial(_write, folder, stored, key, about)))
    return paths


def _write(
    folder: Path,
    stored: reference_cache.StoredLogps | None,
    key: dict[str, str],
    about: dict[str, str],
) -> Path:
    """In the main process, which has the numbers."""
    assert stored is not None
    return reference_cache.write(folder, stored, key, about)
