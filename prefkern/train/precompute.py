"""`prefkern precompute`: reference log-probabilities of a data set, once for many runs."""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from ..integrations.head import at_head
from . import models, output, pairing, reference_cache
from .config import TrainConfig
from .processes import make_accelerator
from .run import make_loader, pad_id


def precompute(config: TrainConfig) -> list[Path]:
    """Writes one cache for `dataset` and one for `eval_dataset` into output_dir; returns the paths.

    The reference is `ref_model`, else `model`, as it would be in training.
    """
    output.check_writable(Path(config.output_dir))
    output.check_inputs(config)
    accelerator = make_accelerator(config)
    if accelerator.num_processes > 1:
        raise ValueError("precompute runs in one process; start it without torchrun.")
    name = config.ref_model or config.model
    tokenizer = models.load_tokenizer(config.model)
    model = models.freeze(models.load_model(name, config)).to(accelerator.device)
    at_head(model)
    sources = [(config.dataset, config.dataset_split, config.limit)]
    if config.eval_dataset is not None:
        sources.append((config.eval_dataset, config.eval_split, config.eval_limit))
    loader = make_loader(config, tokenizer, model)
    paths, packed = [], None
    for source, split, limit in sources:
        examples, _, report = loader.load(source, split, limit)
        print(f"{source}: {report}")
        if packed is None:
            pairing.check_own_logits(model, config)
            packed = pairing.choose_packing(print, model, examples, config)
        size = config.per_device_eval_batch_size
        steps = tqdm(range(0, len(examples), size), disable=config.disable_tqdm)
        stored = reference_cache.compute(
            model, examples, config, packed=packed, pad_id=pad_id(tokenizer, model), progress=steps
        )
        key = reference_cache.cache_key(examples, model, config)
        about = {"rows": reference_cache.rows_key(examples)}
        folder = Path(config.output_dir)
        paths.append(reference_cache.write(folder, stored, key, about))
    return paths
