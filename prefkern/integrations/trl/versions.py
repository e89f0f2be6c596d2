"""Which TRL this adapter knows, and swapping its names for the time of a constructor."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VERSIONS = ("1.15", "1.16")  # each with all of its patch releases
_OTHERS = {
    False: "its trainers have no fused head before 1.15",
    True: "it is newer than what was tested, and TRL moves its hooks between minor releases",
}
# Everything of TRL that is called, overridden or swapped: parameters of functions, fields of
# dataclasses. Checked before anything is.
_KNOWN: dict[str, tuple[str, ...]] = {
    "trainer.utils:add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "trainer.utils:FusedCausalLMOutput": (
        "loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask",
        "aux_loss",
    ),
    "trainer.utils:create_model_from_path": ("model_id", "architecture", "kwargs"),
    "trainer.utils:use_adapter": ("model", "adapter_name"),
    "trainer.utils:pad": ("tensors", "padding_value", "padding_side", "pad_to_multiple_of"),
    "models.utils:prepare_deepspeed": ("model", "accelerator"),
    "models.utils:prepare_fsdp": ("model", "accelerator"),
    "models.utils:disable_gradient_checkpointing": ("model", "gradient_checkpointing_kwargs"),
    "data_utils:_tokenize": ("processing_class", "input", "apply_chat_template_kwargs"),
    "data_utils:common_prefix_length": ("ids", "other_ids"),
    "trainer.dpo_trainer:DPOTrainer._compute_loss": ("self", "model", "inputs", "return_outputs"),
    "trainer.dpo_trainer:DPOTrainer._prepare_dataset": (
        "self", "dataset", "processing_class", "args", "dataset_name",
    ),
    "trainer.dpo_trainer:DPOTrainer._set_signature_columns_if_needed": ("self",),
    "trainer.dpo_trainer:DPOTrainer.compute_ref_log_probs": ("self", "model", "inputs"),
    "trainer.kto_trainer:KTOTrainer._compute_loss": ("self", "model", "inputs", "return_outputs"),
    "trainer.kto_trainer:KTOTrainer._set_signature_columns_if_needed": ("self",),
    "trainer.kto_trainer:KTOTrainer.compute_ref_log_probs": ("self", "model", "inputs"),
}  # fmt: skip


def check_version(version: str) -> None:
    """Raises ImportError, with the reason, for a TRL that this adapter does not know."""
    minor = ".".join(version.split(".")[:2])
    if minor in VERSIONS and version.replace(".", "").isdigit():
        return
    number = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    newer = number >= tuple(int(part) for part in VERSIONS[-1].split("."))
    raise ImportError(
        f"prefkern.integrations.trl knows TRL {' and '.join(VERSIONS)}, found {version}: "
        f"{_OTHERS[newer]}. Install trl=={VERSIONS[-1]}.*, or train with `prefkern train`."
    )


def check_signatures() -> None:
    """Raises ImportError where a function of TRL is not the one that was recorded."""
    for path, want in _KNOWN.items():
        module, _, name = path.partition(":")
        try:
            found: Any = importlib.import_module(f"trl.{module}")
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ImportError(f"prefkern.integrations.trl needs trl.{path}: {error}.") from error
        got = getattr(found, "__dataclass_fields__", None) or inspect.signature(found).parameters
        if tuple(got) != want:
            raise ImportError(
                f"trl.{path} takes {tuple(got)}, where this adapter knows {want}: this TRL was "
                f"changed; install trl=={VERSIONS[-1]}.* as it is published."
            )


@contextmanager
def swapped(module: Any, names: dict[str, Any]) -> Iterator[None]:
    """`names` of a module stand for others inside the block, and are put back however it ends."""
    if missing := [name for name in names if not hasattr(module, name)]:
        raise RuntimeError(f"{module.__name__} has no {missing}: this TRL was changed.")
    old = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in old.items():
            setattr(module, name, value)
