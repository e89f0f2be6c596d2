"""What --dry-run shows of a prepared run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..integrations import hf
from ..integrations.output_layer import output_layer_of
from . import zero
from .config import TrainConfig
from .data import Loaded
from .data_providers import Columns
from .providers import Provider
from .sharded import size
from .step import PreferenceStep


def facts_of(
    config: TrainConfig,
    step: PreferenceStep,
    providers: Sequence[Provider],
    mode: str,
    packed: bool,
    head_difference: float,
    data: Loaded,
    eval_data: Loaded | None,
) -> dict[str, Any]:
    """The model's head, where the reference comes from, columns and counts, as plain values."""
    layer = output_layer_of(step.policy)
    weight, bias = layer.parameters[:2]
    inner = hf.causal_lm(step.policy)
    parameters = list(step.parameters())
    columns = [c for p in providers if isinstance(p, Columns) for c in p.columns.values()]
    return {
        "model": type(inner).__name__,
        "parameters": sum(map(size, parameters)),
        "trainable": sum(size(p) for p in parameters if p.requires_grad),
        "head": {
            "vocabulary": layer.vocabulary,
            "hidden": zero.shape(weight)[1],
            "dtype": str(weight.dtype).removeprefix("torch."),
            "bias": bias is not None,
            "scale": layer.options["scale"],
            "softcap": layer.options["softcap"],
            "tied": weight is inner.get_input_embeddings().weight,
            "largest_difference_to_own_logits": head_difference,
        },
        "reference": mode,
        "layout": data.layout,
        "columns": {column.argument: column.column for column in columns},
        "batches": "packed" if packed else "padded",
        "data": counts(data),
        "eval_data": None if eval_data is None else counts(eval_data),
    }


def counts(data: Loaded) -> dict[str, Any]:
    sequences = [seq for example in data.examples for seq in example.sequences]
    return {
        "groups": len(data.examples),
        "sequences": len(sequences),
        "tokens": sum(len(seq.input_ids) for seq in sequences),
        "scored_tokens": sum(seq.length for seq in sequences),
        "report": data.report.as_dict(),
    }
