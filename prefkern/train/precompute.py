"""`prefkern precompute`: reference log-probabilities of a data set, once for many runs."""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from ..integrations import hf
from . import checks, fuse, models, reference_cache
from .config import TrainConfig
from .run import load_data, make_accelerator


def precompute(config: TrainConfig) -> list[Path]:
    """Writes one cache for `dataset` and one for `eval_dataset` into output_dir; returns the paths.

    The reference is `ref_model`, else `model`, as it would be in training.
    """
    accelerator = make_accelerator(config)
    if accelerator.num_processes > 1:
        raise ValueError("precompute runs in one process; start it without torchrun.")
    name = config.ref_model or config.model
    tokenizer = models.load_tokenizer(config.model)
    model = models.freeze(models.load_model(name, config)).to(accelerator.device)
    hf.refuse_unsupported(model)
    sources = [(config.dataset, config.dataset_split, config.limit)]
    if config.eval_dataset is not None:
        sources.append((config.eval_dataset, config.eval_split, config.eval_limit))
    paths, packed = [], None
    for source, split, limit in sources:
        examples, _, report = load_data(source, split, config, limit, tokenizer, model)
        print(f"{source}: {report}")
        if packed is None:
            checks.check_first_batch(model, examples, config)
            packed = checks.choose_packing(print, model, examples, config)
        size = config.per_device_eval_batch_size
        steps = tqdm(range(0, len(examples), size), disable=config.disable_tqdm)
        logp, cu_seqlens = reference_cache.compute(
            model,
            examples,
            config,
            packed=packed,
            pad_id=tokenizer.pad_token_id or 0,
            device=accelerator.device,
            progress=steps,
        )
        key = reference_cache.cache_key(examples, model, config)
        about = {"rows": fuse.rows_key(examples)}
        folder = Path(config.output_dir)
        paths.append(reference_cache.write(folder, logp, cu_seqlens, key, about))
    return paths
